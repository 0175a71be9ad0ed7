"""Order documents by their share of selected tokens, highest last (2603.05353, sec. 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ifkv.cache.stitch import stitch
from ifkv.documents.cache import DocumentCache
from ifkv.steps.score import score
from ifkv.steps.select import budget, select

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache


def reorder(
    model: PreTrainedModel,
    documents: Sequence[DocumentCache],
    query_ids: Sequence[int] | Tensor,
    *,
    ratio: float = 0.15,
    layers: Sequence[int] | None = None,
    kv_dtype: torch.dtype | None = None,
) -> list[int]:
    """Order documents by the share of their tokens selected, for ``stitch(..., order=...)``.

    Documents are scored in the ``hl-tp`` geometry, where all are equally near to the query. Use it
    for independent passages; a narrative loses its thread.

    Args:
        model: A patched model.
        documents: Documents that the model made behind one prefix.
        query_ids: The scoring tokens.
        ratio: Share of the context that counts as selected.
        layers: As in [ifkv.score][].
        kv_dtype: Of the cache that is scored, as in [ifkv.stitch][].

    Returns:
        Indices into ``documents``, ascending by hits per token, ties in the order given.

    Raises:
        NotPatchedError: The model is not patched.
        InvalidInputError: As of [ifkv.stitch][], [ifkv.score][] and [ifkv.select][].
        FingerprintMismatchError: A document was made by another model.
    """
    budget(1, ratio)  # refuse a bad ratio before any work
    cache = stitch(model, documents, geometry="hl-tp", kv_dtype=kv_dtype)
    return order_by_hits(cache, score(model, cache, query_ids, layers=layers), ratio)


def order_by_hits(cache: StitchedCache, scores: Tensor, ratio: float) -> list[int]:
    """Return the order of `reorder` from scores.

    Args:
        cache: The cache that was scored, stitched in the documents' given order.
        scores: ``[T]``; those of the prefix are overwritten.
        ratio: As in `reorder`.
    """
    # No document is first yet, so none is protected. The prefix always stays in front.
    scores[: cache.prefix_length] = scores.min() - 1
    selected = select(cache, scores, ratio=ratio, protect_first=False).cpu()
    hits = [
        float(((selected >= rows.start) & (selected < rows.stop)).sum()) / (rows.stop - rows.start)
        for rows in cache.document_slices
    ]
    return sorted(range(len(hits)), key=hits.__getitem__)
