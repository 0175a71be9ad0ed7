"""Attention backends: one contract (:mod:`ifkv.backends.base`), several implementations."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

from ifkv.errors import BackendUnavailableError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.backends.base import Backend

_log = logging.getLogger("ifkv")
NAMES = ("reference",)


def resolve_backend(name: str, model: PreTrainedModel) -> Backend:
    """The backend of that name.

    Args:
        name: One of ``NAMES``, or ``"auto"``.
        model: The model it shall serve.

    Raises:
        BackendUnavailableError: There is no such backend, or it cannot run here.
    """
    if name == "auto":
        name = "reference"
        _say_once(f"ifkv: attention backend {name!r} on {model.device}")
    if name not in NAMES:
        raise BackendUnavailableError(
            f"backend {name!r} is unknown; choose one of {', '.join(NAMES)} or 'auto'."
        )
    from ifkv.backends.reference import ReferenceBackend

    return ReferenceBackend()


@cache
def _say_once(message: str) -> None:
    _log.info(message)
