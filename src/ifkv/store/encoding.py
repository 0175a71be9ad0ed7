"""Fill a store: prefill what it lacks, and put every batch as soon as it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ifkv.documents import DEFAULT_BATCH_TOKENS, DocumentCache, prefill_documents
from ifkv.errors import DocumentNotFoundError, StoreCorruptionError
from ifkv.store.keys import key_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.store.protocol import DocumentStore


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What :func:`encode_documents` did.

    Attributes:
        keys: The documents' keys, in the order given.
        made: How many distinct documents were prefilled and put.
        present: How many distinct documents were there already.
    """

    keys: list[str]
    made: int
    present: int


def encode_documents(
    model: PreTrainedModel,
    store: DocumentStore,
    documents: Sequence[Sequence[int] | Tensor],
    *,
    prefix: Sequence[int] | Tensor = (),
    batch_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Encoded:
    """Prefill documents that a store lacks and put them, a batch at a time.

    What was put before an interruption is there when the same call is made again.

    Args:
        model: A patched model.
        store: The store.
        documents: Token ids of each document.
        prefix: Token ids that every document is encoded behind.
        batch_tokens: As in :func:`ifkv.prefill_documents`.
        on_progress: Called with tokens done and tokens to do, at the start and after each batch;
            documents that were there count as done.

    Returns:
        Keys and counts.

    Raises:
        NotPatchedError: The model is not patched.
        InvalidInputError: A document is none.
        StoreFullError: The store has no room for more.
    """
    keys = [key_for(model, ids, prefix) for ids in documents]
    distinct = dict(zip(keys, documents, strict=True))
    missing = [(key, ids) for key, ids in distinct.items() if key not in store]
    made = len(missing)
    total = sum(len(ids) for ids in distinct.values())
    done = total - sum(len(ids) for _, ids in missing)
    report = on_progress or (lambda *_: None)
    report(done, total)
    behind: Sequence[int] | Tensor | DocumentCache = prefix
    if missing and len(prefix):
        behind = _stored_prefix(model, store, prefix) or prefix
    budget = batch_tokens or DEFAULT_BATCH_TOKENS
    while missing:
        size = len(missing[0][1])
        count = 1
        while count < len(missing) and size + len(missing[count][1]) <= budget:
            size += len(missing[count][1])
            count += 1
        batch, missing = missing[:count], missing[count:]
        for document in prefill_documents(
            model, [ids for _, ids in batch], prefix=behind, batch_tokens=batch_tokens
        ):
            store.put(document)
            behind = document.prefix or prefix
        done += size
        report(done, total)
    return Encoded(keys, made, len(distinct) - made)


def _stored_prefix(
    model: PreTrainedModel, store: DocumentStore, prefix: Sequence[int] | Tensor
) -> DocumentCache | None:
    """The prefix's rows if the store has them."""
    try:
        return store.get(key_for(model, prefix))
    except (DocumentNotFoundError, StoreCorruptionError):
        return None
