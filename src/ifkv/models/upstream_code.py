"""Check that a model runs upstream code that ifkv was reviewed for, and warn otherwise."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import TYPE_CHECKING, Any

from ifkv.errors import UpstreamWarning
from ifkv.models.config_overlay import below
from ifkv.models.decoder import DecoderView
from ifkv.models.families import FUNCTIONS
from ifkv.models.source_hash import code_of, hash_of
from ifkv.models.wrappers import METHODS, wrapper_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PreTrainedModel

    from ifkv.models.families import Family


def warn_of_unread_code(model: PreTrainedModel, family: Family) -> None:
    """Warn once of a model's classes and functions that were not reviewed, and name them.

    Code is compared by its hash and not by its name. So new releases of transformers, subclasses,
    classes that came with a checkpoint, and replaced functions are all noticed.

    Args:
        model: A model of the family's structure.
        family: The family.
    """
    unread: dict[str, None] = {}
    for path, part in _parts(model, family):
        if not _is_known(part, family.upstream_hashes[path]):
            unread[_name(part, path)] = None
    for path, part, hashes in _parts_around(model):
        if not _is_known(part, hashes):
            unread[_name(part, path)] = None
    unread |= dict.fromkeys(_foreign_attention(model))
    if unread:
        warnings.warn(
            f"{', '.join(unread)}: not the code that family {family.name!r} was written for, so "
            "ifkv may not fit it. Check this model with `ifkv verify` (or "
            "ifkv.testing.verify.verify) before you trust its answers.",
            UpstreamWarning,
            stacklevel=3,  # the caller of patch()
        )


def _parts(model: PreTrainedModel, family: Family) -> Iterator[tuple[str, Any]]:
    """Yield each part of the code that the model runs, after its path in the family file."""
    view = DecoderView(model)
    if wrapper_of(model) is None:
        yield family.causal_lm_class, model
    yield family.model_class, view.stack
    yield family.rotary_class, view.rotary
    layers = view.layers
    yield from {type(layer): (family.layer_class, layer) for layer in layers}.values()
    attentions = {type(layer.self_attn): layer.self_attn for layer in layers}
    for attention in attentions.values():
        yield family.attention_class, attention
        for name in FUNCTIONS:
            yield family.function(name), attention_function(attention, name)


def _parts_around(model: PreTrainedModel) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """Yield each part of the code around a wrapped decoder, with its path and known hashes."""
    wrapper = wrapper_of(model)
    if wrapper is None:
        return
    inner = wrapper.inner_of(model)
    yield wrapper.outer_class, model, wrapper.upstream_hashes[wrapper.outer_class]
    yield wrapper.inner_class, inner, wrapper.upstream_hashes[wrapper.inner_class]
    for method in METHODS:
        path = f"{wrapper.inner_class}.{method}"
        yield path, getattr(type(inner), method, None), wrapper.upstream_hashes[path]


def _foreign_attention(model: PreTrainedModel) -> Iterator[str]:
    """Yield the name of the model's attention function if it is not upstream's.

    Such a function may compute something else than ifkv's passes, which follow the family's facts.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = below(DecoderView(model).config)
    function = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    home = str(getattr(function, "__module__", "transformers"))
    # Names with a slash are hub kernels, which transformers registers.
    if home.partition(".")[0] != "transformers" and "/" not in config._attn_implementation:
        yield f"the attention {config._attn_implementation!r} of {home}"


def attention_function(attention: nn.Module, name: str) -> Any:
    """Return the function that an attention module's forward finds under a name, or None.

    A subclass may be in another module and call the forward it inherits, so the first class whose
    module has this name counts.
    """
    kind: Any = type(attention)
    return _names_of(kind, name).get(name)


@functools.cache
def _names_of(kind: type[nn.Module], name: str) -> dict[str, Any]:
    for each in kind.__mro__:
        forward = vars(each).get("forward")
        names: dict[str, Any] = (
            getattr(inspect.unwrap(forward), "__globals__", {}) if forward else {}
        )
        if name in names:
            return names
    return {}


def _is_known(part: Any, hashes: tuple[str, ...]) -> bool:
    try:
        return hash_of(code_of(part)) in hashes
    except (AttributeError, OSError, TypeError, SyntaxError, AssertionError):
        return False  # not a Python function, or one without source


def _name(part: Any, path: str) -> str:
    if part is None:
        return f"{path} (missing)"
    code = getattr(part, "_orig_mod", part)
    named = code if hasattr(code, "__qualname__") else type(code)
    return f"{named.__module__}.{named.__qualname__}"
