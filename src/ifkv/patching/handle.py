"""Patch a transformers model in place, and restore it completely.

A patch does two things. It registers an attention function and a mask function with transformers,
under a name that no other model has. And it puts an *overlay* over the config of the decoder stack,
so that only this model uses the name. Both functions delegate every call without an ifkv pass to
the attention that the model used before, so ordinary ``model(...)`` and ``model.generate(...)``
give bit-equal results.

A change of the overlay (`ifkv.models.config_overlay`) is a change of the config below, and the
reverse. Another model built from either config computes the same as without the patch. Copying and
pickling ignore the overlay: a copy of a patched model is an ordinary, unpatched model.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator
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
from ifkv.models.picture_positions import check_pictures_move
from ifkv.models.support import check_mode, check_structure, check_weights
from ifkv.models.upstream_code import warn_of_unread_code
from ifkv.models.wrappers import wrapper_of
from ifkv.patching.request import Checked, current

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from ifkv.backends.base import Backend
    from ifkv.models.rope import Rope
    from ifkv.models.wrappers import Wrapper

_handles: weakref.WeakKeyDictionary[PreTrainedModel, PatchHandle] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_names = itertools.count()


class PatchHandle:
    """Handle of a patched model, returned by `patch`; a context manager that undoes the patch.

    Attributes:
        family: Facts of the family of the model's decoder.
        wrapper: Facts of what is around the decoder; None for a model without a vision tower.
        backend: Attention backend of ifkv's own passes.
        rope: Rotary embedding of the model.
        name: Name under which the model's attention is registered.
        fingerprints: Fingerprint of the model, kept until its weights change.
        captures: CUDA graphs for few rows (`ifkv.forward.graphs`) if the model is on a GPU. Set it
            to None to launch every kernel instead.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        backend: Backend,
        rope: Rope,
        wrapper: Wrapper | None = None,
    ):
        self.family = family
        self.wrapper = wrapper
        self.backend = backend
        self.rope = rope
        self.name = f"ifkv-{next(_names)}"
        self.fingerprints = FingerprintCache()
        self.captures = Captures(model.device) if model.device.type == "cuda" else None
        self._model = weakref.ref(model)
        self._entered = 0
        self._covered: list[tuple[nn.Module, PreTrainedConfig]] = []
        # A model that is dropped without unpatch() must not leave its functions registered, and
        # parts of it that live on must not look for them.
        self._restore = weakref.finalize(model, _restore, self.name, self._covered)
        self._restore.atexit = False

    def _attach(self, model: PreTrainedModel) -> None:
        from ifkv.patching.functions import register

        stack = DecoderView(model).stack
        config = cast("PreTrainedConfig", stack.config)
        # A model built from a patched model's config has the overlay of that model.
        underlying, covered = below(config), self._covered
        register(self.name, underlying, self.backend, self.family.sliding_window)
        laid = overlay(underlying, self.name, lambda: bool(covered))
        for module in stack.modules():
            if getattr(module, "config", None) is config:
                covered.append((module, config))
                module.config = cast(Any, laid)

    def identity(self, model: PreTrainedModel, *, sample: bool = True) -> str:
        """Return the model's fingerprint; within `checked_once` its weights are looked at once.

        Args:
            model: The model of this handle.
            sample: Whether to look at the weights' numbers, too, and not only where they lie.
        """
        request = current.get()
        if request is None or request.fingerprints is not self.fingerprints:
            return self.fingerprints.of(model, sample=sample)
        if request.identity is None or (sample and not request.sampled):
            request.identity = self.fingerprints.of(model, sample=sample)
            request.sampled = request.sampled or sample
        return request.identity

    def unpatch(self) -> None:
        """Restore the model; do nothing if it is already restored."""
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
        # Blocks may nest in independent functions; the outermost one undoes the patch.
        with _lock:
            self._entered -= 1
            if self._entered == 0:
                self.unpatch()

    def __repr__(self) -> str:
        state = "active" if self._covered else "undone"
        return f"<PatchHandle {self.family.name}, backend={self.backend.name!r}, {state}>"


def _restore(name: str, covered: list[tuple[nn.Module, PreTrainedConfig]]) -> None:
    """Give the covered modules their config back, and unregister the functions."""
    from ifkv.patching.functions import unregister

    for module, config in covered:
        module.config = cast(Any, config)
    covered.clear()
    unregister(name)


def check_model(model: PreTrainedModel) -> Family:
    """Return the family of a model, and raise if the model cannot be patched.

    Raises:
        UnsupportedModelError: As in `patch`.
    """
    family = resolve_family(model)
    check_structure(model, family)
    check_weights(model)
    check_mode(model)
    return family


def patch(model: PreTrainedModel, *, backend: str | Backend = "auto") -> PatchHandle:
    """Patch a causal language model in place.

    Everything is checked before anything changes. If the model is already patched, its handle is
    returned and the fingerprint is computed again; if another backend is asked for, the patch is
    made again. Copies of a patched model (``deepcopy``, pickle) are not patched.

    Args:
        model: A model of a type that ``ifkv families`` lists, in ``eval()`` mode.
        backend: ``"reference"`` (torch, any device), ``"flashinfer"`` (CUDA) or ``"auto"``; or a
            backend object, such as ``FlashInferBackend(mask="split")``.

    Returns:
        The handle. As a context manager it undoes the patch on exit; of nested blocks over one
        model, the outermost one does.

    Raises:
        UnsupportedModelError: No family covers the model, a fact of its family does not hold, its
            weights are not all on one device, it carries adapters or hooks, or it is in training
            mode.
        UnsupportedRopeError: Its keys cannot be moved exactly to other positions.
        BackendUnavailableError: The backend cannot run here.

    Warns:
        UpstreamWarning: The model runs code that ifkv was not reviewed for; check it with
            ``ifkv verify``.

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
        wrapper = wrapper_of(model)
        if wrapper is not None:
            check_pictures_move(model, wrapper)
        chosen = resolve_backend(backend, model)
        existing = _handles.get(model)
        if existing is not None:
            named = isinstance(backend, str) and existing.backend.name == chosen.name
            if backend == "auto" or named or existing.backend is chosen:
                existing.fingerprints = FingerprintCache()
                return existing
            existing.unpatch()
        warn_of_unread_code(model, family)
        handle = PatchHandle(model, family, chosen, rope, wrapper)
        handle._attach(model)
        _handles[model] = handle
        return handle


def unpatch(model: PreTrainedModel) -> None:
    """Restore a patched model: its configs and the registered functions.

    Args:
        model: The model; nothing happens if it is not patched.
    """
    with _lock:
        handle = _handles.get(model)
        if handle is not None:
            handle.unpatch()


def handle_of(model: PreTrainedModel) -> PatchHandle:
    """Return the handle of a patched model, after a check that the model can be used.

    Raises:
        NotPatchedError: The model is not patched.
        UnsupportedModelError: The model is in training mode, carries adapters or hooks, or runs
            under ``torch.autocast``.
    """
    handle = None
    with contextlib.suppress(TypeError):  # not a model, and without weak references
        handle = _handles.get(model)
    if handle is None:
        raise NotPatchedError(
            f"this {type(model).__name__} is not patched; call ifkv.patch(model) first."
        )
    request = current.get()
    if request is None or request.fingerprints is not handle.fingerprints:
        check_mode(model)
    return handle


@contextlib.contextmanager
def checked_once(model: PreTrainedModel) -> Iterator[PatchHandle]:
    """Check a model at the door of a request, for all steps within the block.

    Its hooks, its mode and its weights are looked at once. Blocks may nest.

    Yields:
        The model's handle.

    Raises:
        NotPatchedError: As of `handle_of`.
        UnsupportedModelError: As of `handle_of`.
    """
    handle = handle_of(model)
    request = current.get()
    if request is not None and request.fingerprints is handle.fingerprints:
        yield handle
        return
    token = current.set(Checked(handle.fingerprints))
    try:
        yield handle
    finally:
        current.reset(token)
