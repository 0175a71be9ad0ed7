"""The protocol of document stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.documents.cache import DocumentCache
    from ifkv.documents.surrogate import SurrogateContext, Texts


@dataclasses.dataclass(frozen=True)
class StoreStats:
    """Numbers of a store: its contents, and its counts since it was opened.

    Attributes:
        documents: Entries, prefixes included.
        tokens: Tokens of all entries.
        nbytes: Bytes that count against the budget.
        max_bytes: The budget, or None.
        pinned: Entries that are never evicted.
        hits: Documents handed out by this store object.
        misses: Documents that it was asked for and did not have.
        evictions: Entries that it has dropped to stay within its budget.
        corrupt: Entries that could not be trusted.
    """

    documents: int = 0
    tokens: int = 0
    nbytes: int = 0
    max_bytes: int | None = None
    pinned: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    corrupt: int = 0


@runtime_checkable
class DocumentStore(Protocol):
    """Store of prefilled documents by content.

    A document is stored as [ifkv.prefill_documents][] made it: behind its prefix, and alone or
    behind a surrogate context, which is part of its key. The prefix's rows are a separate entry,
    stored once for all documents behind it. Several threads may use a store. A document is
    present when both it and its prefix are.
    """

    def key_for(
        self,
        model: PreTrainedModel,
        token_ids: Sequence[int] | Tensor,
        prefix: Sequence[int] | Tensor | DocumentCache = (),
        surrogate: SurrogateContext | Texts | None = None,
    ) -> str:
        """Return the key of a document, whether or not the store holds it.

        Args:
            model: A patched model.
            token_ids: The document's tokens, ``[n]``.
            prefix: The tokens it is encoded behind.
            surrogate: The surrogate context it is encoded behind, as in
                [ifkv.prefill_documents][].

        Returns:
            64 hex digits.
        """
        ...

    def put(self, document: DocumentCache, *, replace: bool = False) -> str:
        """Store a document and, once, its prefix; one that exists is only marked as used.

        Args:
            document: The document.
            replace: Replace the document under its key, for instance by one with sensitivities.
                The old one stays until the new one is stored.

        Returns:
            Its key.

        Raises:
            StoreFullError: It does not fit; nothing was stored, except that the prefix may have
                been.
            InvalidInputError: The document contradicts itself.
        """
        ...

    def get(self, key: str, *, lazy: bool = False) -> DocumentCache:
        """Return the document under a key; its ``.prefix`` is shared by all documents behind it.

        Args:
            key: A key that `put` or `key_for` returned.
            lazy: Read layers when they are first needed, if the store can. Then ``stitch`` reads
                ahead in the background.

        Raises:
            DocumentNotFoundError: It is missing; also a ``KeyError``.
            StoreCorruptionError: The stored bytes cannot be trusted: prefill the document again
                and put it, which replaces it.
            StoreUnavailableError: The stored bytes cannot be read now. They may be sound.
        """
        ...

    def touch(self, key: str) -> None:
        """Record a use of a document that was read from a faster tier, if it is there."""
        ...

    def __contains__(self, key: object) -> bool: ...

    def __len__(self) -> int: ...

    def delete(self, key: str) -> None:
        """Delete an entry; deleting a prefix deletes the documents behind it too.

        Raises:
            DocumentNotFoundError: There is no such entry.
        """
        ...

    def keys(self) -> Iterator[str]:
        """Return the keys of all entries, prefixes included, least recently used first if known."""
        ...

    def stats(self) -> StoreStats:
        """Return the store's numbers."""
        ...
