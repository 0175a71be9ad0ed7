"""Which weights of a model came from its checkpoint, and which are random numbers.

transformers fills what a checkpoint lacks with random numbers, and says so in a log alone.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ifkv.errors import InvalidInputError, UnloadedWeightsWarning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMED = 4


def check_report(report: Mapping[str, Any], model: PreTrainedModel, source: str) -> None:
    """Refuse a model whose weights are not all, and only, what its checkpoint holds.

    What transformers leaves in its report counts: it has taken out of it what is tied to other
    weights or computed anew. Further weights are let pass that no part of the model could take,
    as heads of other tasks and the scales of quantized caches, and all that a quantized checkpoint
    brings along.

    Args:
        report: What ``from_pretrained(..., output_loading_info=True)`` returned, with
            ``ignore_mismatched_sizes=True``.
        model: The model.
        source: Its folder or hub id.

    Raises:
        InvalidInputError: Weights are missing, have other sizes than the config says, or would have
            been left out.
    """
    if report["missing_keys"]:
        raise InvalidInputError(
            f"{source!r} lacks weights that the model needs: {listed(report['missing_keys'])}; "
            "they would be random numbers. Give a checkpoint that is complete."
        )
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        count = len(report["mismatched_keys"])
        raise InvalidInputError(
            f"the config.json of {source!r} contradicts its weights: {name} has the shape "
            f"{tuple(found)}, where the config asks for {tuple(wanted)} ({count} such "
            f"weight{'s' if count > 1 else ''}). Give the config.json that belongs to the weights."
        )
    quantized = getattr(model.config, "quantization_config", None) is not None
    inside = f"{model.base_model_prefix}."
    unread = [
        name
        for name in report["unexpected_keys"]
        if name.startswith(inside) and name.endswith((".weight", ".bias"))
    ]
    if unread and not quantized:
        raise InvalidInputError(
            f"{source!r} has weights that its config.json leaves no place for: {listed(unread)}; "
            "the model would compute something else without them. Give the config.json that "
            "belongs to the weights."
        )


def warn_of_unloaded(model: PreTrainedModel) -> None:
    """Warn of weights that did not come from the checkpoint that the others came from.

    transformers marks each parameter that it loads. Where some bear the mark and others do not,
    those were missing in the checkpoint, or were set by hand since. A model without any mark was
    made or copied in memory, and nothing is known of it. Weights that another library keeps in
    classes of its own are not asked.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return
    plain = {
        name: parameter
        for name, parameter in model.named_parameters()
        if type(parameter) is nn.Parameter and type(parameter.data) is Tensor
    }
    unmarked = [name for name, each in plain.items() if not hasattr(each, "_is_hf_initialized")]
    if unmarked and len(unmarked) < len(plain):
        warnings.warn(
            f"{listed(unmarked)} of this {type(model).__name__} did not come from the checkpoint "
            "that its other weights came from. If the checkpoint lacks them they are random "
            "numbers, and so are answers (from_pretrained(..., output_loading_info=True) tells); "
            "if you set them yourself, all is well.",
            UnloadedWeightsWarning,
            stacklevel=3,
        )


def listed(names: Iterable[str]) -> str:
    """Return names of weights in a few words; those of several layers alike are one.

    >>> listed(["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"])
    'model.layers.*.mlp.up_proj.weight (2)'
    """
    patterns: dict[str, list[str]] = {}
    for name in sorted(names):
        patterns.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    shown = [
        found[0] if len(found) == 1 else f"{pattern} ({len(found)})"
        for pattern, found in patterns.items()
    ]
    more = f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
    return ", ".join(shown[:_NAMED]) + more
