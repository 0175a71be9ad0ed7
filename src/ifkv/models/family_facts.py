"""Check that the facts of a family file hold for a model."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ifkv.errors import UnsupportedModelError
from ifkv.models.decoder import DecoderView
from ifkv.models.experts import has_experts
from ifkv.models.rope import rotate
from ifkv.models.upstream_code import attention_function
from ifkv.models.wrappers import wrapper_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ifkv.models.families import Family
    from ifkv.models.wrappers import Wrapper

# Larger than rounding in float32, and smaller than the effect of any other pairing of dimensions.
TOLERANCE = 1e-4

# Norms in front of the attention, by the names that upstream gives them.
_ATTENTION_NORMS = ("input_layernorm", "attention_layernorm")
# Fields of configs that scale embeddings or logits, each with the value that changes nothing.
_SCALARS_OF_CONFIGS: dict[str, float | None] = {
    "embedding_multiplier": 1,
    "logits_scaling": 1,
    "logit_scale": 1,
    "final_logit_softcapping": None,
}


def check_facts(model: PreTrainedModel, family: Family) -> None:
    """Raise if a fact of the family does not hold for the model.

    Args:
        model: A model of the family's structure, its weights in memory.
        family: The family.

    Raises:
        UnsupportedModelError: Its norms, projections, windows, rotation, scalars or experts differ.
    """
    view = DecoderView(model)
    config: Any = view.config
    if not getattr(config, "is_causal", True):
        raise _refusal(model, family, "config.is_causal is False: rows see what comes behind them")
    for index, layer in enumerate(view.layers):
        attention: Any = layer.self_attn
        found = (
            *_of_norm(layer, family),
            *_of_projections(attention, family, config),
            *_of_window(attention, family, config, index),
        )
        for contradiction in found:
            raise _refusal(model, family, f"layer {index} {contradiction}")
        if index == 0:
            _check_rotation(model, family, attention)
    _check_frequencies(model, family)
    for contradiction in _of_scalars(model, view, family):
        raise _refusal(model, family, contradiction)
    if family.experts == "none" and has_experts(model):
        has = "has layers with experts"
        raise _refusal(model, family, f"{has}, but family {family.name!r} says experts = 'none'")


def _refusal(model: PreTrainedModel, family: Family, contradiction: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{contradiction}; so this {type(model).__name__} is no model of that family, whatever its "
        f"model_type says. Describe it in a new file beside patches/{family.name}.toml."
    )


def _of_norm(layer: Any, family: Family) -> Iterator[str]:
    """Yield contradictions of ``attention_norm``."""
    stated = family.attention_norm
    found = [name for name in _ATTENTION_NORMS if hasattr(layer, name)]
    if (stated == "none" and found) or (stated != "none" and not hasattr(layer, stated)):
        yield (
            f"has {' and '.join(found) or 'no norm'} in front of its attention, but family "
            f"{family.name!r} says attention_norm = {stated!r}"
        )


def _of_scalars(model: Any, view: DecoderView, family: Family) -> Iterator[str]:
    """Yield contradictions of ``scalars``: a number that is missing, or that nobody would apply."""
    for name, path in family.scalars.items():
        try:
            number = operator.attrgetter(path)(model)
        except AttributeError:
            yield f"has no {path}, which family {family.name!r} names in scalars as {name}"
            continue
        if number is not None and not isinstance(number, int | float):
            yield f"has {path} = {number!r}, which is no number, but scalars name it as {name}"
    read = {path.rpartition(".")[2] for path in family.scalars.values()}
    for name, without_effect in _SCALARS_OF_CONFIGS.items():
        number = getattr(view.config, name, None)
        if number not in (None, without_effect) and name not in read:
            yield f"has config.{name} = {number}, but family {family.name!r} names no such scalar"


def _of_projections(attention: Any, family: Family, config: Any) -> Iterator[str]:
    """Yield contradictions of ``qk_norm`` and ``fused_qkv``, and settings no family allows."""
    if not getattr(attention, "is_causal", True):
        yield "has is_causal = False: its rows see what comes behind them"
    expected = family.qk_norm
    if expected == "by-config":
        expected = "per-head" if getattr(config, "use_qk_norm", False) else "none"
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name, None)
        if (norm is not None) != (expected != "none"):
            yield (
                f"{'lacks' if norm is None else 'has'} {name}, but family {family.name!r} says "
                f"qk_norm = {family.qk_norm!r}"
            )
            continue
        if norm is not None and expected in ("per-head", "all-heads"):
            width, head = norm.weight.numel(), attention.head_dim
            projection = getattr(attention, name.replace("norm", "proj"), None)
            every = getattr(projection, "out_features", width)
            if width != (head if expected == "per-head" else every):
                yield (
                    f"has a {name} of width {width} for heads of {head}, {every} in all, but "
                    f"family {family.name!r} says qk_norm = {family.qk_norm!r}"
                )
    separate = all(hasattr(attention, name) for name in ("q_proj", "k_proj", "v_proj"))
    if hasattr(attention, "qkv_proj") != family.fused_qkv or separate == family.fused_qkv:
        made = "separate projections" if separate else "no separate projections"
        yield (
            f"has {made} of queries, keys and values, but family {family.name!r} says "
            f"fused_qkv = {str(family.fused_qkv).lower()}"
        )


def _of_window(attention: Any, family: Family, config: Any, index: int) -> Iterator[str]:
    """Yield contradictions of the family's ``sliding_window``."""
    stated, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    own = getattr(attention, "sliding_window", None)
    rule = f"family {family.name!r} says sliding_window = {family.sliding_window!r}"
    if family.sliding_window == "none":
        if stated or own:  # some configs state 0 for none
            yield f"has a sliding window of {own or stated}, but {rule}"
    elif family.sliding_window == "layer-types":
        kind = types[index] if types is not None and index < len(types) else None
        expected = {"full_attention": None, "sliding_attention": stated}
        if kind not in expected:
            yield f"is of type {kind!r} by config.layer_types, but {rule}, full or sliding"
        elif own != expected[kind]:
            yield (
                f"attends with a window of {own} where config.layer_types ({kind}) and "
                f"config.sliding_window ({stated}) ask for {expected[kind]}, and {rule}"
            )
    elif own not in (None, stated):
        yield f"has its own sliding window of {own}, but {rule}"
    elif stated is not None and types is not None and set(types) != {"sliding_attention"}:
        yield f"is among layers of types {sorted(set(types))}, but {rule}"


@torch.no_grad()
def _check_rotation(model: PreTrainedModel, family: Family, attention: Any) -> None:
    """Raise if an attention rotates queries and keys differently than ifkv does."""
    apply = attention_function(attention, "apply_rotary_pos_emb")
    if apply is None:
        return  # it calls code that was not reviewed; `warn_of_unread_code` warns of it
    device, half = model.device, DecoderView(model).rotary.inv_freq.numel()
    heads = torch.linspace(-1, 2, 2 * attention.head_dim, device=device)
    heads = heads.reshape(1, 1, 2, attention.head_dim)
    angles = torch.linspace(0.1, 3, 2 * half, device=device).reshape(2, half).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        turned = apply(heads, heads, cos[None], sin[None])
    except (RuntimeError, TypeError, ValueError):
        return  # it takes other arguments, and a pass would fail on its own
    expected = rotate(heads, cos, sin)
    for part in turned:
        if part.shape != expected.shape or not torch.allclose(part, expected, atol=TOLERANCE):
            raise _refusal(
                model,
                family,
                f"apply_rotary_pos_emb pairs dimensions in another way than family {family.name!r} "
                f"says, rope_layout = {family.rope_layout!r}",
            )


@torch.no_grad()
def _check_frequencies(model: PreTrainedModel, family: Family) -> None:
    """Raise if the angles of a rotary module are not position times frequency, in two halves."""
    rotary = DecoderView(model).rotary
    if getattr(rotary, "rope_type", "default") == "longrope":
        return  # a call would change which frequencies it uses
    like = torch.empty(0, dtype=torch.float32, device=model.device)
    positions = torch.tensor([0, 1, 5], device=model.device)
    inv_freq = rotary.inv_freq.to(model.device).float()
    wrapper = wrapper_of(model)
    if wrapper is None:
        cos, sin = rotary(like, position_ids=positions[None])
        angles = (positions[:, None] * inv_freq).repeat(1, 2)
    else:
        axes = torch.arange(wrapper.rope_axes, device=model.device)[:, None]
        places = positions + 7 * axes * positions  # another angle on every axis
        cos, sin = rotary(like, position_ids=places[:, None])
        angles = (places[_axis_of_frequencies(rotary, wrapper)].T * inv_freq).repeat(1, 2)
    scaling = getattr(rotary, "attention_scaling", 1.0)
    for part, expected in ((cos[0], angles.cos() * scaling), (sin[0], angles.sin() * scaling)):
        if part.shape != expected.shape or not torch.allclose(part, expected, atol=TOLERANCE):
            raise _refusal(
                model,
                family,
                f"{type(rotary).__name__} turns dimensions by other angles than position times "
                f"inv_freq, in two halves, as family {family.name!r} says, "
                f"rope_layout = {family.rope_layout!r}",
            )


def _axis_of_frequencies(rotary: Any, wrapper: Wrapper) -> Tensor:
    """Return the axis whose positions each frequency turns by, as a wrapper states it, ``[half]``.

    Axis 0 takes what the sections leave.
    """
    sections: list[int] = list(rotary.mrope_section)
    index = torch.arange(rotary.inv_freq.numel(), device=rotary.inv_freq.device)
    found = torch.zeros_like(index)
    start = sections[0]
    for axis, section in enumerate(sections[1:], start=1):
        if wrapper.rope_sections == "runs":
            found[start : start + section] = axis
            start += section
        else:
            found[(index % len(sections) == axis) & (index < len(sections) * section)] = axis
    return found
