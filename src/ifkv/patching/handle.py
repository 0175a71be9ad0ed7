"""Patch a transformers model in place, and undo it without a trace.

A patch does two things. It registers one attention function and one mask function under a name of
its own through transformers' official interfaces, and it lays an *overlay* over the config of the
decoder stack, so that this model alone looks its attention up under that name. Both functions hand
every call that carries no ifkv pass to whatever attention the model used before, so ordinary
``model(...)`` and ``model.generate(...)`` stay bit for bit the same.

An overlay (`ifkv.models.config_overlay`) sees changes of the config below, as that sees changes of
the overlay. Another model built from either config object computes what it would without the patch.
Copying and pickling see through it: a copy of a patched model is an ordinary, unpatched model.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from ifkv.errors import NotPatchedError
from ifkv.forward.graphs import Captures
from ifkv.models.config_overlay import below, overlay
from ifkv.models.decoder import DecoderView
from ifkv.models.families import Family, resolve_family
from ifkv.models.family_facts import check_facts
from ifkv.models.fingerprint import FingerprintCache
from ifkv.models.loaded_weights import warn_of_unloaded
from ifkv.models.support import check_mode, check_structure, check_weights
from ifkv.models.upstream_code import warn_of_unread_code

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from ifkv.backends.base import Backend
    from ifkv.models.rope import Rope

_handles: weakref.WeakKeyDictionary[PreTrainedModel, PatchHandle] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_names = itertools.count()


class PatchHandle:
    """What `patch` returns: a view of the patch, and a context manager that undoes it.

    Attributes:
        family: The facts of the model's family.
        backend: The attention backend that runs ifkv's own passes.
        rope: The model's rotary geometry.
        name: The name that this model's attention is registered under.
        fingerprints: The model's fingerprint, kept until its weights change.
        captures: On a CUDA card, the CUDA graphs that few rows run in (`ifkv.forward.graphs`);
            set it to None to have every kernel launched by itself.
    """

    def __init__(self, model: PreTrainedModel, family: Family, backend: Backend, rope: Rope):
        self.family = family
        self.backend = backend
        self.rope = rope
        self.name = f"ifkv-{next(_names)}"
        self.fingerprints = FingerprintCache()
        self.captures = Captures(model.device) if model.device.type == "cuda" else None
        self._model = weakref.ref(model)
        self._entered = 0
        self._covered: list[tuple[nn.Module, PreTrainedConfig]] = []
        # A model that is dropped without unpatch() must not leave its functions registered, nor
        # parts of it that live on looking for them.
        self._restore = weakref.finalize(model, _restore, self.name, self._covered)
        self._restore.atexit = False

    def _attach(self, model: PreTrainedModel) -> None:
        from ifkv.patching.functions import register

        stack = DecoderView(model).stack
        config = cast("PreTrainedConfig", stack.config)
        # A model built from a patched model's config holds that one's overlay.
        underlying, covered = below(config), self._covered
        register(self.name, underlying, self.backend)
        laid = overlay(underlying, self.name, lambda: bool(covered))
        for module in stack.modules():
            if getattr(module, "config", None) is config:
                covered.append((module, config))
                module.config = cast(Any, laid)

    def unpatch(self) -> None:
        """Restore the model; does nothing if that has been done already."""
        with _lock:
            self._restore()
            self.captures = None
            model = self._model()
            if model is not None and _handles.get(model) is self:
                del _handles[model]

    def __enter__(self) -> PatchHandle:
        with _lock:
            model = self._model()
            if model is not None and _handles.get(model) is not self:
                raise NotPatchedError(
                    "this patch has been undone, here or in another thread; call "
                    "ifkv.patch(model) again."
                )
            self._entered += 1
            return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Blocks may nest, in functions that know nothing of each other: the outermost undoes.
        with _lock:
            self._entered -= 1
            if self._entered == 0:
                self.unpatch()

    def __repr__(self) -> str:
        state = "active" if self._covered else "undone"
        return f"<PatchHandle {self.family.name}, backend={self.backend.name!r}, {state}>"


def _restore(name: str, covered: list[tuple[nn.Module, PreTrainedConfig]]) -> None:
    """Give the covered modules their config back and remove what is registered under the name."""
    from ifkv.patching.functions import unregister

    for module, config in covered:
        module.config = cast(Any, config)
    covered.clear()
    unregister(name)


def check_model(model: PreTrainedModel) -> Family:
    """Refuse a model that cannot be patched as it is, and return its family.

    Raises:
        UnsupportedModelError: As of `patch`.
    """
    family = resolve_family(model)
    check_structure(model, family)
    check_weights(model)
    check_mode(model)
    return family


def patch(model: PreTrainedModel, *, backend: str | Backend = "auto") -> PatchHandle:
    """Patch a causal language model in place.

    Everything is checked before anything changes. Patching a patched model returns the handle it
    already has, with its fingerprint taken anew, unless another backend is asked for: then the
    patch is made anew. Copies of a patched model (``deepcopy``, pickle) are not patched.

    Args:
        model: A Llama, Qwen, Mistral or Phi-3 model from transformers, in ``eval()`` mode.
        backend: ``"reference"`` (torch, any device), ``"flashinfer"`` (CUDA), or ``"auto"``;
            or a backend made by hand, such as ``FlashInferBackend(mask="split")``.

    Returns:
        The handle; as a context manager it undoes the patch on exit (of nested blocks over one
        model, the outermost does).

    Raises:
        UnsupportedModelError: No family covers the model, it contradicts a fact of its family, its
            weights are not all on one device, it carries adapters or hooks, or it is in training
            mode.
        UnsupportedRopeError: Its rotary embedding cannot be moved exactly.
        BackendUnavailableError: The backend asked for cannot run here.

    Warns:
        UpstreamWarning: The model runs code that nobody has read; ``ifkv verify`` tells whether
            ifkv fits it.

    Examples:
        >>> import ifkv
        >>> from ifkv.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> with ifkv.patch(model) as handle:
        ...     handle.family.name, handle.backend.name
        ('llama', 'reference')
    """
    from ifkv.backends import resolve_backend
    from ifkv.models.rope import Rope

    with _lock:
        family = check_model(model)
        warn_of_unloaded(model)
        rope = Rope(model, family)
        check_facts(model, family)
        chosen = resolve_backend(backend, model)
        existing = _handles.get(model)
        if existing is not None:
            named = isinstance(backend, str) and existing.backend.name == chosen.name
            if backend == "auto" or named or existing.backend is chosen:
                existing.fingerprints = FingerprintCache()
                return existing
            existing.unpatch()
        warn_of_unread_code(model, family)
        handle = PatchHandle(model, family, chosen, rope)
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
        UnsupportedModelError: The model is in training mode, carries adapters or hooks, or runs
            under ``torch.autocast``.
    """
    handle = None
    with contextlib.suppress(TypeError):  # of what is no model and cannot be referred to weakly
        handle = _handles.get(model)
    if handle is None:
        raise NotPatchedError(
            f"this {type(model).__name__} is not patched; call ifkv.patch(model) first."
        )
    check_mode(model)
    return handle
