"""What modules compute with: their classes, weights, and what is kept beside the weights.

Layers of other libraries keep scales, zero points and settings where no parameter or buffer names
them. bitsandbytes' 4-bit weights carry a ``quant_state``; the scales of its 8-bit weights, ``SCB``,
lie in the weight, and from the first forward on in what its layer calls ``state``, among what it
remembers of that forward; HQQ's layers have a dictionary ``meta``. torchao's tensors say themselves
what they consist of.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ifkv.models.decoder import DecoderView

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Modules of these have no settings beside their config, but for numbers such as an epsilon.
_UPSTREAM = (
    "torch.nn.",
    "torch._dynamo.",
    "transformers.models.",
    "transformers.activations",
    "ifkv.testing.",
)
# Attributes of layers that hold what their weights are to be read by.
_BESIDE = ("quant_state", "meta")
# What bitsandbytes' 8-bit layers are to be read by.
_EIGHT_BITS = ("SCB", "threshold")
# Larger whole numbers are addresses, which kernels of some libraries are handed; another each time.
_LARGEST = 2**40

State = tuple[str, "Tensor | str"]


def is_foreign(module: nn.Module) -> bool:
    """Whether a module is of another library, or somebody's own."""
    return not type(module).__module__.startswith(_UPSTREAM)


def is_quantized(module: nn.Module) -> bool:
    """Whether a foreign module holds weights that are no plain numbers."""
    held = (*module._parameters.values(), *module._buffers.values())
    return is_foreign(module) and any(
        type(each) not in (Tensor, nn.Parameter) or not each.is_floating_point()
        for each in held
        if each is not None
    )


def weight_state(weight: Tensor, name: str = "") -> Iterator[State]:
    """What a parameter or buffer consists of: itself, unless it wraps others, and what it carries.

    Args:
        weight: The parameter or buffer.
        name: Its name.

    Yields:
        Names with tensors, or with settings in words.
    """
    if type(weight) in (Tensor, nn.Parameter):
        yield name, weight
        return
    flatten: Any = getattr(weight, "__tensor_flatten__", None)
    if flatten is not None:
        parts, context = flatten()
        for part in parts:
            yield from weight_state(getattr(weight, part), f"{name}.{part}")
        yield from _inside(context, f"{name}.context", set())
        return
    yield name, weight
    seen = {id(weight)}
    for key, value in sorted(vars(weight).items()):
        # The 8-bit scales are found with the layer; CB is the weight itself.
        if not key.startswith("_") and key not in ("CB", "SCB"):
            yield from _inside(value, f"{name}.{key}", seen)


def module_state(module: nn.Module, *, plain_tensors: bool = True) -> Iterator[State]:
    """What a module computes with beside its parameters, buffers and children.

    Attributes whose names begin with an underscore are not looked at.

    Args:
        module: The module.
        plain_tensors: Whether tensors that are simply attributes count, too. In layers of
            libraries that quantize they may be room for intermediate results.

    Yields:
        Names with tensors, or with settings in words.
    """
    own, foreign = vars(module), is_foreign(module)
    for key, value in sorted(own.items()):
        if key.startswith("_") or key == "training":
            continue
        if isinstance(value, float) or (foreign and _is_setting(value)):
            yield key, repr(value)
        elif foreign and plain_tensors and isinstance(value, Tensor):
            yield from weight_state(value, key)
    if not foreign:
        return
    weight, state = own["_parameters"].get("weight"), own.get("state")
    for key in _BESIDE:
        if getattr(weight, key, None) is None:  # a weight that carries it says so itself
            yield from _inside(own.get(key), key, set())
    for key in _EIGHT_BITS:
        value = getattr(state, key, None)
        yield from _inside(getattr(weight, key, None) if value is None else value, key, set())


def settings_of(module: nn.Module) -> tuple[tuple[str, object], ...]:
    """A foreign module's settings as they are now, for a quick comparison."""
    return tuple(
        (key, value)
        for key, value in vars(module).items()
        if not key.startswith("_") and _is_setting(value)
    )


def settle(model: PreTrainedModel) -> None:
    """Run one row, so that layers that prepare their weights at the first forward have done so.

    bitsandbytes packs 4-bit weights anew then on some processors, and moves its 8-bit scales.
    """
    base: Any = DecoderView(model).stack
    with torch.no_grad():
        base(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)


def _is_setting(value: object) -> bool:
    if isinstance(value, int):
        return abs(value) < _LARGEST
    return isinstance(value, float | str | torch.dtype | enum.Enum)


def _inside(value: Any, name: str, seen: set[int]) -> Iterator[State]:
    """Tensors and settings in an object, down to the objects, lists and dictionaries it holds."""
    if value is None:
        return
    if isinstance(value, Tensor):
        yield from weight_state(value, name)
    elif _is_setting(value):
        yield name, repr(value)
    elif id(value) in seen or isinstance(value, nn.Module | type) or callable(value):
        return
    else:
        seen.add(id(value))
        if isinstance(value, list | tuple):
            held: Any = enumerate(value)
        else:
            named = value if isinstance(value, dict) else getattr(value, "__dict__", {})
            held = sorted((str(key), each) for key, each in named.items())
        for key, each in held:
            if not str(key).startswith("_"):
                yield from _inside(each, f"{name}.{key}", seen)
