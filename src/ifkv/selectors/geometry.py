"""Scoring under positions of another geometry than the cache's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ifkv.cache.stitch import stitch
from ifkv.cost import Cost, ModelShape
from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.layout import Geometry
    from ifkv.cache.stitched import StitchedCache
    from ifkv.documents.images import ImageRows
    from ifkv.selectors.protocol import Request


def in_geometry(
    model: PreTrainedModel, cache: StitchedCache, request: Request, geometry: Geometry
) -> tuple[StitchedCache, Cost]:
    """Return the cache, or its documents stitched once more in another geometry.

    A stitched cache has no keys from before the rotation, and a second rotation would round them
    twice. So another geometry is made from the documents.

    Args:
        model: A patched model.
        cache: The request's cache.
        request: The request, with its documents.
        geometry: The geometry wanted.

    Returns:
        A cache with the same slots, and its cost: the bytes that were read and written.

    Raises:
        InvalidInputError: The request has no documents, or not those of the cache.
    """
    if geometry == cache.geometry:
        return cache, Cost()
    if request.documents is None:
        raise InvalidInputError(
            f"scoring in the geometry {geometry!r} needs the documents, but the request has none; "
            "give Request(documents=...) what the cache was stitched from."
        )
    if len(request.documents) != len(cache.order):
        raise InvalidInputError(
            f"the request has {len(request.documents)} documents, the cache {len(cache.order)}; "
            "give those the cache was stitched from."
        )
    twin = stitch(
        model,
        request.documents,
        order=cache.order,
        geometry=geometry,
        kv_dtype=cache.kv_dtype,
    )
    alike = torch.equal(twin.token_ids, cache.token_ids)
    if not alike or list(map(_identity, twin.images)) != list(map(_identity, cache.images)):
        raise InvalidInputError(
            "the request's documents are not those of the cache; give what it was stitched from, "
            "in the same order."
        )
    rows = 2.0 * cache.context_length * len(cache.layers) * ModelShape.of(model).row_bytes
    return twin, Cost(bytes=2 * rows)


def _identity(images: ImageRows | None) -> str | None:
    """Return what tells a document's pictures from others of the same sizes."""
    return None if images is None else images.identity
