"""State of modules beside their weights: scales, zero points and settings.

Layers of other libraries keep such state outside of parameters and buffers. bitsandbytes' 4-bit
weights have a ``quant_state``. The scales of its 8-bit weights, ``SCB``, are in the weight, and
after the first forward in the layer's ``state``. HQQ's layers have a dictionary ``meta``. torchao's
tensors list their parts themselves.
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

# Modules of these packages keep no settings beside their config, except floats such as an epsilon.
_UPSTREAM = (
    "torch.nn.",
    "torch._dynamo.",
    "transformers.models.",
    "transformers.activations",
    "ifkv.testing.",
)
# Attributes of layers that hold scales and settings of their weights.
_BESIDE = ("quant_state", "meta")
# Scales and settings of bitsandbytes' 8-bit layers.
_EIGHT_BITS = ("SCB", "threshold")
# Larger whole numbers are addresses for some libraries' kernels; they differ in every process.
_LARGEST = 2**40

State = tuple[str, "Tensor | str"]


def is_foreign(module: nn.Module) -> bool:
    """True if a module's class is neither torch's nor transformers'."""
    return not type(module).__module__.startswith(_UPSTREAM)


def is_quantized(module: nn.Module) -> bool:
    """True if a foreign module holds weights that are not plain floating-point tensors."""
    held = (*module._parameters.values(), *module._buffers.values())
    return is_foreign(module) and any(
        type(each) not in (Tensor, nn.Parameter) or not each.is_floating_point()
        for each in held
        if each is not None
    )


def weight_state(weight: Tensor, name: str = "") -> Iterator[State]:
    """Yield the state of a parameter or buffer: its tensors and the settings it carries.

    Args:
        weight: The parameter or buffer.
        name: Its name.

    Yields:
        Names with tensors, or with settings as text.
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
        # `module_state` yields the 8-bit scales; CB is the weight itself.
        if not key.startswith("_") and key not in ("CB", "SCB"):
            yield from _inside(value, f"{name}.{key}", seen)


def module_state(module: nn.Module, *, plain_tensors: bool = True) -> Iterator[State]:
    """Yield the state of a module beside its parameters, buffers and children.

    Attributes whose names begin with an underscore are ignored.

    Args:
        module: The module.
        plain_tensors: Include tensors that are plain attributes. In layers of libraries that
            quantize, they may be memory for intermediate results.

    Yields:
        Names with tensors, or with settings as text.
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
        if getattr(weight, key, None) is None:  # otherwise `weight_state` yields it
            yield from _inside(own.get(key), key, set())
    for key in _EIGHT_BITS:
        value = getattr(state, key, None)
        yield from _inside(getattr(weight, key, None) if value is None else value, key, set())


def settings_of(module: nn.Module) -> tuple[tuple[str, object], ...]:
    """Return the current settings of a foreign module, for a quick comparison."""
    return tuple(
        (key, value)
        for key, value in vars(module).items()
        if not key.startswith("_") and _is_setting(value)
    )


def settle(model: PreTrainedModel) -> None:
    """Run one row, because some layers prepare their weights at the first forward.

    bitsandbytes then moves its 8-bit scales, and on some processors packs 4-bit weights again.
    """
    base: Any = DecoderView(model).stack
    with torch.no_grad():
        base(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)


def _is_setting(value: object) -> bool:
    if isinstance(value, int):
        return abs(value) < _LARGEST
    return isinstance(value, float | str | torch.dtype | enum.Enum)


def _inside(value: Any, name: str, seen: set[int]) -> Iterator[State]:
    """Yield tensors and settings in an object, and in the objects, lists and dictionaries in it."""
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
