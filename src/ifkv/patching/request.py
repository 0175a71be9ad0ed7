"""Checks of a model that one request has made, so that its steps need not repeat them."""

from __future__ import annotations

import contextvars
import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ifkv.models.fingerprint import FingerprintCache


@dataclasses.dataclass(eq=False)
class Checked:
    """A model that has been checked at the door of a request.

    Attributes:
        fingerprints: The model's, which also say which model it is.
        identity: Its fingerprint, once a step has asked for it.
        sampled: Whether its weights have been sampled, too.
    """

    fingerprints: FingerprintCache
    identity: str | None = None
    sampled: bool = False


# Of this thread, or this task of an event loop.
current: contextvars.ContextVar[Checked | None] = contextvars.ContextVar("checked", default=None)
