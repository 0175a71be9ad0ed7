"""Checks that a cache is a stitched one, of this model, and in a state to be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ifkv.cache.interface import check_single
from ifkv.cache.stitched import StitchedCache
from ifkv.errors import FingerprintMismatchError, GeometryError, InvalidInputError
from ifkv.patching.handle import PatchHandle, handle_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_stitched(cache: object) -> None:
    """Refuse an object that is no stitched cache.

    Raises:
        InvalidInputError: It is something else.
    """
    if not isinstance(cache, StitchedCache):
        raise InvalidInputError(
            f"a {type(cache).__name__} was given as cache; make one with ifkv.stitch."
        )


def check_cache(model: PreTrainedModel, cache: StitchedCache) -> PatchHandle:
    """Refuse a cache that does not belong to the model.

    Returns:
        The model's handle.

    Raises:
        NotPatchedError: The model is not patched.
        InvalidInputError: It is no stitched cache, or holds several sequences.
        FingerprintMismatchError: It belongs to another model.
    """
    handle = handle_of(model)
    check_stitched(cache)
    check_single(cache)
    identity = handle.identity(model, sample=False)  # stitch has done so
    if cache.fingerprint != identity:
        raise FingerprintMismatchError(
            f"the cache belongs to model {cache.fingerprint[:8]}, this one is {identity[:8]}. "
            "Stitch documents that this model made."
        )
    return handle


def check_answerable(cache: StitchedCache, what: str) -> None:
    """Refuse a cache that can only be scored, or that holds more than its context.

    Raises:
        GeometryError: The geometry is not global.
        InvalidInputError: Rows have been appended behind the context.
    """
    if cache.geometry != "global":
        raise GeometryError(
            f"{what} needs the geometry 'global', the cache has {cache.geometry!r}, which can only "
            "be scored. Stitch the documents again."
        )
    if cache.appended:
        raise InvalidInputError(
            f"{what} needs a cache that ends with its context, but {cache.appended} slots have "
            "been appended. Call cache.crop() first."
        )
