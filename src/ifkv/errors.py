"""Errors and warnings that ifkv raises.

Every error a caller can provoke is an `IfkvError`. Each message names the value that was
found, the rule it breaks and what to do about it. Errors about an argument are ``ValueError`` too.
"""

from __future__ import annotations


class IfkvError(Exception):
    """Base of every error that ifkv raises on purpose."""


class UnsupportedModelError(IfkvError):
    """The model belongs to no family in ``patches/``, or breaks a rule of its family."""


class UnsupportedRopeError(UnsupportedModelError):
    """The model's rotary embedding cannot be moved exactly from one position to another."""


class BackendUnavailableError(IfkvError):
    """The backend that was asked for cannot run here."""


class NotPatchedError(IfkvError):
    """The model has not been patched with [ifkv.patch][]."""


class InvalidInputError(IfkvError, ValueError):
    """An argument breaks a rule; nothing has been computed or changed."""


class FingerprintMismatchError(InvalidInputError):
    """A cache was made by another model, dtype, prefix or rope configuration."""


class GeometryError(InvalidInputError):
    """The stitched cache's positions do not allow what was asked of it."""


class StoreError(IfkvError):
    """A document store cannot do what was asked of it."""


class DocumentNotFoundError(StoreError, KeyError):
    """The store holds no document under this key: it was never put, or has been evicted."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # KeyError would print the message's repr


class StoreNotFoundError(StoreError, InvalidInputError):
    """The place that was named is no store and cannot become one; nothing has been done there."""


class DocumentUnreadableError(StoreError):
    """A store has a document, but it cannot be had from there; it can be prefilled again.

    Attributes:
        key: The document's key, or an empty string if it is about none.
        reason: Reason why the document cannot be read.
    """

    def __init__(self, message: str, *, key: str = "", reason: str = ""):
        super().__init__(message)
        self.key = key
        self.reason = reason or message


class StoreCorruptionError(DocumentUnreadableError):
    """Content of a store that cannot be trusted, and is not served."""


class StoreUnavailableError(DocumentUnreadableError):
    """The store did not answer in time, or refused: this says nothing about what it holds."""


class PromptWarning(UserWarning):
    """A prompt differs from what its chat template would have written by default."""


class StoreWarning(UserWarning):
    """A store could not give a document; it was prefilled again, and the answer is right."""


class UnloadedWeightsWarning(UserWarning):
    """Some weights of a model did not come from the checkpoint that the others came from."""


class CalibrationWarning(UserWarning):
    """The machine's rates are being measured, cannot be kept, or are those of a busy machine."""


class UpstreamWarning(UserWarning):
    """A model runs code that ifkv was not reviewed for; check it with ``ifkv verify``."""


class StoreFullError(StoreError):
    """The byte budget, or the disk, has no room for the document; nothing was stored."""
