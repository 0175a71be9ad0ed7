"""Attention backends: one contract (`ifkv.backends.base`), several implementations.

Belongs here: the contract of attention, its specs and plans, and every implementation of it,
kernels included.
Not here: layers, caches and passes; a backend sees tensors, positions and index arrays alone.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

from ifkv.backends.base import Backend
from ifkv.errors import BackendUnavailableError
from ifkv.models.decoder import DecoderView

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["NAMES", "Backend", "resolve_backend"]

_log = logging.getLogger("ifkv")
NAMES = ("reference", "flashinfer")


def resolve_backend(backend: str | Backend, model: PreTrainedModel) -> Backend:
    """Return the backend for a model.

    Args:
        backend: One of ``NAMES``; ``"auto"``, which takes FlashInfer if it can run and logs the
            choice once; or a backend object, which is returned unchanged.
        model: The model.

    Raises:
        BackendUnavailableError: There is no such backend, or it cannot run here.
    """
    if isinstance(backend, Backend):
        return backend
    if backend == "flashinfer":
        return _flashinfer(model)
    if backend == "auto":
        try:
            chosen = _flashinfer(model)
        except BackendUnavailableError as error:
            _say_once(f"ifkv: attention backend 'reference' on {model.device}: {error}")
        else:
            _say_once(
                f"ifkv: attention backend 'flashinfer' on {model.device}, {model.dtype}; its "
                "kernels are compiled with nvcc when first used, which takes minutes, once"
            )
            return chosen
    elif backend != "reference":
        raise BackendUnavailableError(
            f"backend {backend!r} is unknown; choose one of {', '.join(NAMES)} or 'auto'."
        )
    from ifkv.backends.reference import ReferenceBackend

    return ReferenceBackend()


def _flashinfer(model: PreTrainedModel) -> Backend:
    from ifkv.backends.flashinfer import availability

    layers = DecoderView(model).layers
    head_dims = {int(layer.self_attn.head_dim) for layer in layers}
    refusal = availability.refusal_of_device(model.device) or availability.refusal_of_model(
        model.dtype, head_dims, DecoderView(model).config.num_attention_heads
    )
    if refusal is not None:
        raise BackendUnavailableError(
            f"backend 'flashinfer' cannot run: {refusal}. It also needs its package: "
            f"{availability.INSTALL}. backend='reference' runs everywhere."
        )
    return _shared_flashinfer()


@cache
def _shared_flashinfer() -> Backend:
    """Return the backend that the process shares, because wrappers and workspaces are costly."""
    from ifkv.backends.flashinfer import FlashInferBackend

    return FlashInferBackend()


@cache
def _say_once(message: str) -> None:
    _log.info(message)
