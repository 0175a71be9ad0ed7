"""Hooks and forwards that hang on single modules, beside what their classes say.

They can change what a model computes without a weight changing: rows made under one would be stored
and served without it. And ifkv's own passes call decoder layers, not the modules above them, so
such a thing could run in one way of asking and not in another. A model that carries one is refused,
but for those that are known to change no number, and for an `observer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules import module as torch_module

from ifkv.errors import UnsupportedModelError
from ifkv.models.decoder import DecoderView
from ifkv.models.weights import tree_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Where functions come from that hang on modules and change no number: those of transformers that
# note outputs (output_hidden_states=True leaves them behind) or ask for gradients, and those by
# which torch counts operations.
_HARMLESS = (
    ("transformers.utils.output_capturing", ""),
    ("transformers.modeling_utils", "make_inputs_require_grads"),
    ("torch.utils.module_tracker", ""),
)
# Methods of the modules above the decoder stack by which a model is asked.
_ASKED_BY = ("generate", "prepare_inputs_for_generation")


class Observer:
    """A forward hook that only looks; see `observer`.

    Args:
        hook: What is called; whatever it returns is dropped.
    """

    def __init__(self, hook: Callable[..., object]):
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call the hook and return nothing, so that no output is replaced."""
        self._hook(*args, **kwargs)


def observer(hook: Callable[..., object]) -> Observer:
    """Declare a forward hook, or forward pre-hook, as one that only looks.

    ifkv refuses models that carry hooks, which could change what is computed; not these. What the
    hook returns is dropped, so it can replace nothing; it must not write into what it is shown. It
    sees the rows that ifkv runs: those that are prefilled, recomputed or asked, not all.

    Args:
        hook: A function as ``register_forward_hook`` or ``register_forward_pre_hook`` takes it.

    Returns:
        What to register in its place.

    Examples:
        >>> import ifkv
        >>> from ifkv.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> seen = []
        >>> look = ifkv.observer(lambda module, args: seen.append(args[0].shape[1]))
        >>> handle = model.model.layers[0].register_forward_pre_hook(look)
        >>> with ifkv.patch(model):
        ...     documents = ifkv.prefill_documents(model, [[5, 6, 7]])
        >>> seen
        [3]
    """
    return Observer(hook)


def check_hooks(model: PreTrainedModel) -> None:
    """Refuse a model on whose modules something hangs that could change what they compute.

    Raises:
        UnsupportedModelError: A module, of the decoder stack or above it, has a forward hook or
            pre-hook that is no observer, a ``forward`` of its own or a parametrization; or torch
            has global hooks.
    """
    for hooks in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
        for hook in hooks.values():
            if not _is_harmless(hook):
                raise UnsupportedModelError(
                    f"torch has a global forward hook ({_name_of(hook)}), which can change what "
                    f"this {type(model).__name__} computes. {_WAY_OUT}"
                )
    base = DecoderView(model).stack
    above: list[nn.Module] = [model]
    for module in above:  # which grows meanwhile
        if any(name in module.__dict__ for name in _ASKED_BY):
            _refuse(model, module, f"has a {'() or '.join(_ASKED_BY)}() of its own", "Delete it.")
        if module is not base:
            above += [each for each in module._modules.values() if each is not None]
    for modules in (above, tree_of(base).modules):
        for module in modules:
            own = module.__dict__  # found sooner there than by module.…, of four hundred modules
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or "forward" in own
                or "parametrizations" in own["_modules"]
            ):
                _check_module(model, module)


def check_classes(model: PreTrainedModel) -> None:
    """Refuse a forward that was put over upstream's above the decoder layers.

    Raises:
        UnsupportedModelError: The model's class, or its decoder stack's, derives from one of
            transformers and overrides its forward, or somebody has replaced that.
    """
    for module in (getattr(model, "_orig_mod", model), DecoderView(model).stack):
        kind: Any = type(module)
        over = [each for each in kind.__mro__ if each.__module__.startswith("transformers.models.")]
        if over and not home_of(kind.forward).startswith("transformers."):
            raise UnsupportedModelError(
                f"{kind.__qualname__}.forward ({_name_of(kind.forward)}) stands in place of the "
                f"forward of {over[0].__qualname__}. Decoder layers are called without it, so what "
                "it adds would be in some answers and not in others. Use the class of transformers "
                "itself; what changes logits can be a logits_processor of the request."
            )


def home_of(function: Any) -> str:
    """The module whose code a function is; wrappers say that they are what they wrap."""
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


_WAY_OUT = (
    "Remove it (handle.remove()); if it only looks, register ifkv.observer(hook) in its place; "
    "what it adds can be put into the weights."
)


def _check_module(model: PreTrainedModel, module: nn.Module) -> None:
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if not _is_harmless(hook):
            _refuse(model, module, f"carries a forward hook ({_name_of(hook)})", _WAY_OUT)
    forward = vars(module).get("forward")
    if forward is not None and not _is_own_forward(module, forward):
        _refuse(
            model,
            module,
            f"has a forward of its own ({_name_of(forward)}) in place of its class's",
            "Delete it (del module.forward), or put what it does into a module of its own class, "
            "whose parameters are counted.",
        )
    if "parametrizations" in module._modules:
        _refuse(
            model,
            module,
            "computes a weight by a parametrization",
            "Call torch.nn.utils.parametrize.remove_parametrizations(module, name), which leaves "
            "the weight that it computes.",
        )


def _refuse(model: PreTrainedModel, module: nn.Module, what: str, way_out: str) -> None:
    name = next(name for name, each in model.named_modules() if each is module)
    where = f"{name} of this {type(model).__name__}" if name else f"this {type(model).__name__}"
    raise UnsupportedModelError(
        f"{where} {what}, which can change what is computed without a weight changing, so stored "
        f"documents could not be told apart. {way_out}"
    )


def _is_harmless(hook: Any) -> bool:
    """Whether a hook is known to change no number."""
    if type(hook) is Observer:
        return True
    home, name = getattr(hook, "__module__", None), getattr(hook, "__qualname__", "")
    return any(home == place and part in name for place, part in _HARMLESS)


def _is_own_forward(module: nn.Module, forward: Any) -> bool:
    """Whether a forward on a module computes what its class's does: compiled, or on a device."""
    if _only_moves(module):
        forward = vars(module).get("_old_forward")
    while hasattr(forward, "_torchdynamo_orig_callable"):
        forward = forward._torchdynamo_orig_callable
    owner, function = getattr(forward, "__self__", None), getattr(forward, "__func__", None)
    # What torch.compile makes of a module calls the module.
    if owner is module._modules.get("_orig_mod", module):
        kind: Any = type(owner)
        return function in (kind.forward, kind.__call__)
    return False


def _only_moves(module: nn.Module) -> bool:
    """Whether accelerate has replaced the forward by one that brings its tensors to a device."""
    hooks: list[Any] = [vars(module).get("_hf_hook")]
    for hook in hooks:  # which grows meanwhile
        kind = type(hook)
        if kind.__module__ != "accelerate.hooks":
            return False
        if kind.__name__ == "SequentialHook":
            hooks += hook.hooks
        elif kind.__name__ != "AlignDevicesHook":
            return False
    return True


def _name_of(function: Any) -> str:
    """A function as its author calls it."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
