"""Keywords that a layer passes to its attention function: all are checked, none is dropped.

A keyword that changes what attention computes, such as ``softcap`` or ``s_aux`` (sinks), must not
be ignored. So every keyword is either understood, or known to change nothing, or refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ifkv.backends.spec import AttentionSpec
from ifkv.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn

UNDERSTOOD = ("scaling", "sliding_window", "softcap", "s_aux")
# Read in the modeling files of all families, from transformers 5.4 to 5.24.
WITHOUT_EFFECT = {
    "position_ids": "the rotation has been applied; FlashAttention alone looks there for packed "
    "sequences, which neither passes nor decoding steps have",
    "use_cache": "layers hand it on; nobody below the model's own forward reads it",
    "output_hidden_states": "the model's own forward collects them around its layers",
}
# Keywords that have no effect only if they are switched off.
SWITCHED_OFF = {
    "dropout": "0 in eval mode, which ifkv requires",
    "output_attentions": "asks for the weights, which neither passes nor decoding steps have",
}


def strange_keywords(keywords: Mapping[str, Any]) -> list[str]:
    """Return the names of keywords that may change the attention and that ifkv does not know.

    Args:
        keywords: Keyword arguments of an attention function, without ``ifkv_pass``.
    """
    return [
        name
        for name, value in keywords.items()
        if value is not None
        and name not in UNDERSTOOD
        and name not in WITHOUT_EFFECT
        and not (name in SWITCHED_OFF and isinstance(value, int | float) and value == 0)
    ]


def spec_of(keywords: Mapping[str, Any]) -> AttentionSpec | None:
    """Return the spec that keywords ask for; None if one of them has an invalid value."""
    scaling, window = keywords.get("scaling"), keywords.get("sliding_window")
    softcap, sinks = keywords.get("softcap"), keywords.get("s_aux")
    if not isinstance(scaling, int | float) or not math.isfinite(scaling):
        return None
    if window is not None and (not isinstance(window, int) or window < 1):
        return None
    if softcap is not None and (not isinstance(softcap, int | float) or not 0 < softcap < math.inf):
        return None
    if sinks is not None and not (isinstance(sinks, Tensor) and sinks.ndim == 1):
        return None
    return AttentionSpec(scaling, window, None if softcap is None else float(softcap), sinks)


def checked_spec(
    module: nn.Module, mask: object, keywords: Mapping[str, Any], window: int | None
) -> AttentionSpec:
    """Return the spec of a layer's attention under one of ifkv's passes.

    Args:
        module: The attention module.
        mask: Its mask; None, because a pass makes its own masks.
        keywords: Its keyword arguments.
        window: Sliding window of the layer by its family's rule. Some layers do not pass theirs
            on, because upstream's masks have it already.

    Raises:
        UnsupportedModelError: The module asks for something that a pass would ignore, or for
            another window.
    """
    found = {name: keywords[name] for name in strange_keywords(keywords)}
    if mask is not None:
        found["attention_mask"] = mask
    spec = spec_of(keywords)
    if spec is None:
        found |= {name: keywords.get(name) for name in UNDERSTOOD}
    if spec is None or found:
        asked = ", ".join(f"{name}={_shown(value)}" for name, value in found.items())
        raise UnsupportedModelError(
            f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')} asks for "
            f"attention with {asked}, which ifkv does not know and will not leave out. Answer "
            "without ifkv, or with a model whose attention a family in patches/ describes."
        )
    if spec.window != window and "sliding_window" in keywords:
        raise UnsupportedModelError(
            f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')} asks for a "
            f"sliding window of {spec.window}, but its family and its config say {window}. Set "
            "the config and every layer to one window, and patch the model again."
        )
    return dataclasses.replace(spec, window=window)


def _shown(value: object) -> str:
    return (
        repr(value)
        if isinstance(value, bool | int | float | str | None)
        else f"a {type(value).__name__}"
    )
