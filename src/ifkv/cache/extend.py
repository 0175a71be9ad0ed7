"""Stitch further documents behind what a request's cache holds already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ifkv.cache.checks import check_answerable, check_cache
from ifkv.cache.inputs import check_documents
from ifkv.cache.layout import Layout, layout
from ifkv.cache.prefix_difference import prefix_difference
from ifkv.cache.stitched import StitchedCache
from ifkv.documents.cache import DocumentCache
from ifkv.errors import FingerprintMismatchError, InvalidInputError
from ifkv.models.rope import place, rotate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def extend(
    model: PreTrainedModel, cache: StitchedCache, documents: Sequence[DocumentCache]
) -> torch.Tensor:
    """Stitch further documents behind the context of a cache, in place.

    Their keys are rotated to the positions that follow the context; what the cache held is
    not changed, and is copied only when there is no room left behind it. As after
    [ifkv.stitch][] the new rows have seen their own document alone, in layers above the first:
    select among them and recompute. An FP8 cache rounds them with its scales.

    Args:
        model: A patched model.
        cache: A stitched cache in the global geometry that ends with its context; rows that were
            appended are made part of it by `StitchedCache.keep`.
        documents: Documents that this model made behind the cache's prefix.

    Returns:
        The new slots, long ``[n]``, on the model's device. A selector that is given
        ``cache.choosing(slots)`` chooses among them alone.

    Raises:
        NotPatchedError: The model is not patched.
        InvalidInputError: No document, rows behind the context, or more tokens than the model has
            positions. Nothing has been changed.
        GeometryError: The cache's geometry is not global.
        FingerprintMismatchError: Cache or document belong to another model, or the document to
            another prefix.

    Examples:
        >>> import ifkv
        >>> from ifkv.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> handle = ifkv.patch(model)
        >>> first, second = ifkv.prefill_documents(model, [[5, 6, 7], [8, 9]], prefix=[1])
        >>> cache = ifkv.stitch(model, [first])
        >>> logits = ifkv.recompute(model, cache, [], prompt_ids=[20, 21])  # a question
        >>> cache.keep([20, 21])
        >>> ifkv.extend(model, cache, [second]).tolist()
        [6, 7]
        >>> cache
        StitchedCache(2 documents, 8 slots + 0, global, ...)
        >>> ifkv.unpatch(model)
    """
    handle = check_cache(model, cache)
    check_answerable(cache, "extend")
    handle.rope.check_frequencies()
    check_documents(model, handle, documents)
    _check_kind(cache, documents[0])
    lengths = [len(document) for document in documents]
    start = cache.context_length
    end = start + sum(lengths)
    placed = layout(
        0,
        lengths,
        "global",
        [document.positions_taken for document in documents],
        [document.offsets for document in documents],
    )
    handle.rope.check_length(cache.query_position + placed.extent, "the extended context")
    slots = torch.arange(start, end, device=model.device)
    positions = placed.positions.to(model.device) + cache.query_position
    turning = documents[0].dtype
    if cache.kv_dtype is not None:  # rotated in at least float32, so that they are rounded once
        turning = torch.promote_types(turning, torch.float32)
    cos, sin = handle.rope.cos_sin(positions, turning)
    for index, layer in enumerate(cache.layers):
        layer.reserve(end)
        slot = start
        for document in documents:
            rows = slice(slot, slot + len(document))
            own = slice(slot - start, rows.stop - start)
            slot = rows.stop
            if document.lazy:
                keys, values = document.layer(index)
            else:
                keys, values = document.keys[index], document.values[index]
            moved = [part.to(model.device, non_blocking=True) for part in (keys, values)]
            if cache.kv_dtype is not None:
                turned = rotate(moved[0].to(turning), cos[own], sin[own])
                layer.write(slots[own], turned[None], moved[1][None])
                continue
            place(
                moved[0][None],
                moved[1][None],
                cos[own],
                sin[own],
                layer.key_buffer,
                layer.value_buffer,
                rows.start,
            )
    _join(cache, documents, placed)
    return slots


def _join(cache: StitchedCache, documents: Sequence[DocumentCache], placed: Layout) -> None:
    """Make rows written behind the context documents of the cache.

    Args:
        cache: The cache.
        documents: The documents of these rows.
        placed: Their layout, counted from the end of the context.
    """
    slices, start = list(cache.document_slices), cache.context_length
    for document in documents:
        slices.append(slice(start, start + len(document)))
        start += len(document)
    # New lists: answers hold on to the old ones.
    cache.document_slices = slices
    cache.order = [*cache.order, *range(len(cache.order), len(slices))]
    cache.sensitivities = [*cache.sensitivities, *(each.sensitivity for each in documents)]
    cache.surrogates = [*cache.surrogates, *(each.surrogate for each in documents)]
    cache.images = [*cache.images, *(each.images for each in documents)]
    token_ids = torch.cat([document.token_ids for document in documents])
    cache.lengthen(token_ids, placed.positions, placed.extent)
    cache.plain = cache.plain and placed.plain
    for layer in cache.layers:
        layer.length = cache.context_length


def _check_kind(cache: StitchedCache, document: DocumentCache) -> None:
    """Refuse documents whose prefix, dtype or shape is not that of the cache's rows."""
    prefix = cache.token_ids[: cache.prefix_length].cpu()
    if not torch.equal(document.prefix_ids, prefix):
        theirs, own = prefix_difference(document.prefix_ids, prefix)
        raise FingerprintMismatchError(
            f"the documents were encoded behind the prefix {theirs}, the cache has {own}; a "
            "request has one prefix. Prefill them behind the same."
        )
    depth, kv_heads, _, head_dim = document.shape
    held, dtype = cache.layers[0].key_buffer, cache.layers[0].dtype
    kind = (len(cache.layers), held.shape[1], held.shape[3], dtype)
    if kind != (depth, kv_heads, head_dim, document.dtype):
        raise InvalidInputError(
            f"the documents hold {document.dtype} {document.shape}, the cache {dtype} in "
            f"{len(cache.layers)} layers of {held.shape[1]} heads of {held.shape[3]}; a request "
            "has documents of one kind."
        )
