"""Weights that a checkpoint lacks: transformers fills them with random numbers.

transformers reports them in its log only. Here they are an error or a warning.
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
    """Raise if the weights of a model and of its checkpoint are not the same set.

    The report of transformers decides; it leaves out weights that are tied to others or computed.
    Unused weights are accepted if no part of the model could hold them, such as heads of other
    tasks and scales of quantized caches. All unused weights of a quantized checkpoint are accepted.

    Args:
        report: Loading info of ``from_pretrained(..., output_loading_info=True,
            ignore_mismatched_sizes=True)``.
        model: The model.
        source: Its folder or hub id.

    Raises:
        InvalidInputError: Weights are missing, have other shapes than the config gives, or would
            be left out.
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
    """Warn of weights that did not come from the checkpoint of the others.

    transformers marks each parameter that it loads. If only some parameters have the mark, the
    others were missing in the checkpoint, or were set later. A model without any mark was made or
    copied in memory, and gives no warning. Quantized models, and parameters of other classes than
    torch's own, are not checked.
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
    """Return names of weights as short text; equal names of several layers become one.

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
