"""Encoding into a store: prefill missing documents, and put every batch when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ifkv.documents.cache import DocumentCache
from ifkv.documents.prefill import Documents, default_batch_tokens, prefill_documents
from ifkv.documents.sensitivity import with_sensitivities
from ifkv.documents.surrogate import SurrogateContext, Texts, before_documents
from ifkv.documents.token_ids import document_tensors, no_padding
from ifkv.errors import DocumentNotFoundError, StoreCorruptionError, StoreFullError
from ifkv.patching.handle import handle_of
from ifkv.store.claims import claims_of
from ifkv.store.keys import document_key
from ifkv.utils.checks import check_positive, token_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.store.protocol import DocumentStore


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Result of `encode_documents`.

    Attributes:
        keys: The documents' keys, in the order given.
        made: Number of distinct documents that were prefilled and put.
        present: Number of distinct documents that existed, with sensitivities if wanted.
        prefix: The prefix's rows as computed; None if nothing was made, or there is no prefix.
    """

    keys: list[str]
    made: int
    present: int
    prefix: DocumentCache | None = None


def encode_documents(
    model: PreTrainedModel,
    store: DocumentStore,
    documents: Documents,
    *,
    attention_mask: Sequence[Sequence[int] | Tensor] | Tensor | None = None,
    prefix: Sequence[int] | Tensor | DocumentCache = (),
    surrogate: SurrogateContext | Texts | None = None,
    batch_tokens: int | None = None,
    sensitivities: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    names: Sequence[str] | None = None,
) -> Encoded:
    """Prefill documents that a store lacks and put them, a batch at a time.

    After an interruption, the same call finds what was put before it. Threads that want the same
    document of one place make it once: the others wait, and if it could not be made, one of them
    makes it. The prefix is computed, never read from the store, whose codec may have rounded it.

    Args:
        model: A patched model.
        store: The store.
        documents: As in [ifkv.prefill_documents][].
        attention_mask: As in [ifkv.prefill_documents][].
        prefix: Token ids that every document is encoded behind, or the rows made for them earlier.
        surrogate: As in [ifkv.prefill_documents][]. It is part of the documents' keys, so one
            that was made behind another, or alone, is not taken for one of these.
        batch_tokens: As in [ifkv.prefill_documents][].
        sensitivities: Measure their sensitivities, for another prefill each
            (`measure_sensitivities`). Documents that exist without them are made again and then
            replaced.
        on_progress: Called with tokens done and tokens to do, at the start and after each batch;
            documents that existed count as done.
        names: Name of each document in an error, such as its file; "document 3" if not given.

    Returns:
        Keys and counts.

    Raises:
        NotPatchedError: The model is not patched.
        InvalidInputError: A document is invalid, or too long for the model.
        StoreFullError: The store has no room for more; the message names the document.
    """
    handle = handle_of(model)
    if batch_tokens is not None:
        check_positive(batch_tokens, "batch_tokens")
    given = prefix.token_ids if isinstance(prefix, DocumentCache) else prefix
    prefix_ids = token_tensor(model, given, "the prefix", empty=True)
    tokens = document_tensors(model, documents, attention_mask, names)
    named = names or [f"document {index}" for index in range(len(tokens))]
    standing_in = None if surrogate is None else SurrogateContext.of(model, surrogate)
    before, what = before_documents(prefix_ids, standing_in)
    for ids, name in zip(tokens, named, strict=True):  # all of them before any work
        handle.rope.check_length(before + len(ids), f"{name} {what}")
    identity = handle.identity(model)
    context = None if standing_in is None else standing_in.identity
    keys = [document_key(identity, prefix_ids, ids, context) for ids in tokens]
    distinct = dict(zip(keys, tokens, strict=True))
    claims, own = claims_of(store), 0
    others = claims.ended  # read first: claims that end later cause another look
    missing = [
        (key, ids) for key, ids in distinct.items() if not _is_there(store, key, sensitivities)
    ]
    total = sum(len(ids) for ids in distinct.values())
    done = total - sum(len(ids) for _, ids in missing)
    report = on_progress or (lambda *_: None)
    report(done, total)
    behind: Tensor | DocumentCache = prefix if isinstance(prefix, DocumentCache) else prefix_ids
    budget = batch_tokens or default_batch_tokens(model.device)
    made = 0
    while missing:
        with claims.some_of(missing, budget) as claimed:
            if (ended := claims.ended - own) != others:  # other threads have made some meanwhile
                others = ended
                missing = [each for each in missing if not _is_there(store, each[0], sensitivities)]
            wanted = {key for key, _ in missing}
            batch = [each for each in claimed if each[0] in wanted]
            texts = [ids for _, ids in batch]
            fresh = prefill_documents(
                model,
                texts,
                attention_mask=no_padding(texts),  # ids are unpadded here
                prefix=behind,
                surrogate=standing_in,
                batch_tokens=batch_tokens,
            )
            if sensitivities and fresh:
                fresh = with_sensitivities(model, fresh)
            for document, (key, _) in zip(fresh, batch, strict=True):
                try:
                    store.put(document, replace=sensitivities)
                except StoreFullError as error:
                    raise StoreFullError(f"{named[keys.index(key)]}: {error}") from error
                behind = document.prefix or prefix_ids
        made += len(batch)
        own += bool(claimed)
        here = {key for key, _ in claimed}
        missing = [each for each in missing if each[0] not in here]
        done = total - sum(len(ids) for _, ids in missing)
        report(done, total)
    rows = behind if made and isinstance(behind, DocumentCache) else None
    return Encoded(keys, made, len(distinct) - made, rows)


def _is_there(store: DocumentStore, key: str, sensitivities: bool) -> bool:
    """True if a store has a document, with sensitivities if they are wanted."""
    if key not in store:
        return False
    if not sensitivities:
        return True
    try:
        return store.get(key, lazy=True).sensitivity is not None
    except (DocumentNotFoundError, StoreCorruptionError):
        return False
