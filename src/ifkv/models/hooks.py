"""Refuse models with hooks, or with forwards that replace those of their classes.

Both can change what a model computes while no weight changes: rows made with a hook would be stored
and served without it. And ifkv's own passes call the decoder layers, not the modules above them, so
a hook there could run for one kind of call and not for another. Hooks that are known to change no
number are accepted, and so is an `observer`.
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

# Modules and names of hooks that change no number: those of transformers that record outputs
# (output_hidden_states=True leaves them behind) or request gradients, and those by which torch
# counts operations.
_HARMLESS = (
    ("transformers.utils.output_capturing", ""),
    ("transformers.modeling_utils", "make_inputs_require_grads"),
    ("torch.utils.module_tracker", ""),
)
# Methods above the decoder stack through which a model answers.
_ASKED_BY = ("generate", "prepare_inputs_for_generation")


class Observer:
    """Forward hook that only reads; see `observer`.

    Args:
        hook: The function to call. Its result is dropped.
    """

    def __init__(self, hook: Callable[..., object]):
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call the hook and return None, so that it replaces no output."""
        self._hook(*args, **kwargs)


def observer(hook: Callable[..., object]) -> Observer:
    """Declare a forward hook or forward pre-hook as one that only reads.

    ifkv refuses models that carry other hooks, because those can change what is computed. The
    result of this hook is dropped, so it can replace nothing. It must not write into its arguments.
    It sees the rows that ifkv runs: prefilled and recomputed rows and those of questions.

    Args:
        hook: A function for ``register_forward_hook`` or ``register_forward_pre_hook``.

    Returns:
        The hook to register.

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
    """Raise if a module carries a hook or forward that could change what it computes.

    Raises:
        UnsupportedModelError: A module in or above the decoder stack has a forward hook or pre-hook
            that is not an observer, a ``forward`` that replaces its class's, or a parametrization;
            or torch has global hooks.
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
    for module in above:  # the list grows during the loop
        if any(name in module.__dict__ for name in _ASKED_BY):
            _refuse(model, module, f"has its own {'() or '.join(_ASKED_BY)}()", "Delete it.")
        if module is not base:
            above += [each for each in module._modules.values() if each is not None]
    for modules in (above, tree_of(base).modules):
        for module in modules:
            own = module.__dict__  # faster than attribute access, for four hundred modules
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or "forward" in own
                or "parametrizations" in own["_modules"]
            ):
                _check_module(model, module)


def check_classes(model: PreTrainedModel) -> None:
    """Raise if a forward above the decoder layers is not upstream's.

    Raises:
        UnsupportedModelError: The class of the model or of its decoder stack overrides the forward
            that it inherits from transformers, or that forward was replaced.
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
    """Return the name of the module that holds a function's code; that of a wrapper's own code."""
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
            f"has its own forward ({_name_of(forward)}) in place of its class's",
            "Delete it (del module.forward), or move it into the forward of a new module class, "
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
    """True if a hook is known to change no number."""
    if type(hook) is Observer:
        return True
    home, name = getattr(hook, "__module__", None), getattr(hook, "__qualname__", "")
    return any(home == place and part in name for place, part in _HARMLESS)


def _is_own_forward(module: nn.Module, forward: Any) -> bool:
    """True if a module's own forward computes the same as its class's, compiled or on a device."""
    if _only_moves(module):
        forward = vars(module).get("_old_forward")
    while hasattr(forward, "_torchdynamo_orig_callable"):
        forward = forward._torchdynamo_orig_callable
    owner, function = getattr(forward, "__self__", None), getattr(forward, "__func__", None)
    # The wrapper made by torch.compile calls the module.
    if owner is module._modules.get("_orig_mod", module):
        kind: Any = type(owner)
        return function in (kind.forward, kind.__call__)
    return False


def _only_moves(module: nn.Module) -> bool:
    """True if accelerate replaced the forward by one that only moves tensors to a device."""
    hooks: list[Any] = [vars(module).get("_hf_hook")]
    for hook in hooks:  # the list grows during the loop
        kind = type(hook)
        if kind.__module__ != "accelerate.hooks":
            return False
        if kind.__name__ == "SequentialHook":
            hooks += hook.hooks
        elif kind.__name__ != "AlignDevicesHook":
            return False
    return True


def _name_of(function: Any) -> str:
    """Return the qualified name of a function, or of the class of a callable object."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
