"""Patch a transformers model in place, and undo it without a trace.

A patch does two things. It registers one attention function and one mask function under a name of
its own through transformers' official interfaces, and it lays an *overlay* over the config of the
decoder stack, so that this model alone looks its attention up under that name. Both functions hand
every call that carries no ifkv pass to whatever attention the model used before, so ordinary
``model(...)`` and ``model.generate(...)`` stay bit for bit the same.

An overlay shares its ``__dict__`` with the config it covers: changes made through either are seen
through both, and another model built from the same config object is not affected.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from ifkv.errors import NotPatchedError, UnsupportedModelError
from ifkv.families import Family, resolve_family
from ifkv.fingerprint import FingerprintCache

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from ifkv.backends.base import Backend
    from ifkv.rope import Rope

_handles: weakref.WeakKeyDictionary[PreTrainedModel, PatchHandle] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_names = itertools.count()


class PatchHandle:
    """What :func:`patch` returns: a view of the patch, and a context manager that undoes it.

    Attributes:
        family: The facts of the model's family.
        backend: The attention backend that runs ifkv's own passes.
        rope: The model's rotary geometry.
        name: The name that this model's attention is registered under.
        fingerprints: The model's fingerprint, kept until its weights change.
    """

    def __init__(self, model: PreTrainedModel, family: Family, backend: Backend, rope: Rope):
        self.family = family
        self.backend = backend
        self.rope = rope
        self.name = f"ifkv-{next(_names)}"
        self.fingerprints = FingerprintCache()
        self._model = weakref.ref(model)
        self._covered: list[tuple[nn.Module, PreTrainedConfig]] = []
        # A model that is dropped without unpatch() must not leave its functions registered.
        self._finalizer = weakref.finalize(model, _unregister, self.name)

    def _attach(self, model: PreTrainedModel) -> None:
        from ifkv.attention import register

        config = cast("PreTrainedConfig", model.base_model.config)
        register(self.name, config, self.backend)
        overlay = _overlay(config, self.name)
        for module in model.base_model.modules():
            if getattr(module, "config", None) is config:
                self._covered.append((module, config))
                module.config = cast(Any, overlay)

    def unpatch(self) -> None:
        """Restore the model; does nothing if that has been done already."""
        with _lock:
            for module, config in self._covered:
                module.config = cast(Any, config)
            self._covered.clear()
            self._finalizer()
            model = self._model()
            if model is not None and _handles.get(model) is self:
                del _handles[model]

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        state = "active" if self._covered else "undone"
        return f"<PatchHandle {self.family.name}, backend={self.backend.name!r}, {state}>"


def _overlay(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """A config that equals `config` in everything, now and later, but for its attention's name."""
    base = type(config)
    stored = cast(property, base._attn_implementation)  # what transformers reads

    def setter(self: Any, value: str | dict[str, str] | None) -> None:
        assert stored.fset is not None
        stored.fset(self, value)

    overlaid = type(
        base.__name__, (base,), {"_attn_implementation": property(lambda _: name, setter)}
    )
    overlay: Any = object.__new__(overlaid)
    object.__setattr__(overlay, "__dict__", config.__dict__)
    return cast("PreTrainedConfig", overlay)


def _unregister(name: str) -> None:
    from ifkv.attention import unregister

    unregister(name)


def patch(model: PreTrainedModel, *, backend: str | Backend = "auto") -> PatchHandle:
    """Patch a causal language model in place.

    Everything is checked before anything changes. Patching a patched model returns the handle it
    already has, unless another backend is asked for: then the patch is made anew.

    Args:
        model: A Llama, Qwen or Mistral model from transformers, in ``eval()`` mode.
        backend: ``"reference"`` (torch, any device), ``"flashinfer"`` (CUDA), or ``"auto"``;
            or a backend made by hand, such as ``FlashInferBackend(mask="tiles")``.

    Returns:
        The handle; as a context manager it undoes the patch on exit.

    Raises:
        UnsupportedModelError: No family covers the model, or it breaks a rule of its family.
        UnsupportedRopeError: Its rotary embedding cannot be moved exactly.
        BackendUnavailableError: The backend asked for cannot run here.

    Example:
        >>> import ifkv
        >>> from ifkv.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> with ifkv.patch(model) as handle:
        ...     handle.family.name, handle.backend.name
        ('llama', 'reference')
    """
    from ifkv.backends import resolve_backend
    from ifkv.rope import Rope

    with _lock:
        family = resolve_family(model)
        _check_structure(model, family)
        chosen = resolve_backend(backend, model)
        existing = _handles.get(model)
        if existing is not None:
            if existing.backend.name == chosen.name:
                return existing
            existing.unpatch()
        handle = PatchHandle(model, family, chosen, Rope(model, family))
        handle._attach(model)
        _handles[model] = handle
        return handle


def unpatch(model: PreTrainedModel) -> None:
    """Restore a patched model: configs, registered functions, everything.

    Args:
        model: The model; one that is not patched is left alone.
    """
    with _lock:
        handle = _handles.get(model)
        if handle is not None:
            handle.unpatch()


def handle_of(model: PreTrainedModel) -> PatchHandle:
    """The handle of a patched model that is ready to be used.

    Raises:
        NotPatchedError: The model is not patched.
        UnsupportedModelError: The model is in training mode.
    """
    handle = _handles.get(model)
    if handle is None:
        raise NotPatchedError(
            f"this {type(model).__name__} is not patched; call ifkv.patch(model) first."
        )
    if model.training:
        raise UnsupportedModelError(
            f"this {type(model).__name__} is in training mode, in which dropout and gradient "
            "checkpointing change what a cache holds; call model.eval() first."
        )
    return handle


def _check_structure(model: PreTrainedModel, family: Family) -> None:
    """Refuse a model whose modules are not what its family file says."""
    if model.get_output_embeddings() is None or model.base_model is model:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head; patch the causal language model "
            "(…ForCausalLM) that holds it."
        )
    base: Any = model.base_model
    attention = family.attention_class.rpartition(".")[2]
    for part in ("embed_tokens", "layers", "norm", "rotary_emb"):
        if not hasattr(base, part):
            raise UnsupportedModelError(
                f"{type(base).__name__} has no {part!r}, which family {family.name!r} expects "
                f"of {family.model_class}; this transformers release may have moved it."
            )
    for index, layer in enumerate(base.layers):
        found = type(getattr(layer, "self_attn", None)).__name__
        if found != attention:
            raise UnsupportedModelError(
                f"layer {index} has attention {found}, but family {family.name!r} expects "
                f"{attention}; ifkv does not approximate an architecture it does not know."
            )
