"""What every document store offers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.documents.cache import DocumentCache


@dataclasses.dataclass(frozen=True)
class StoreStats:
    """What a store holds, and what it has done since it was opened.

    Attributes:
        documents: Entries, prefixes included.
        tokens: Tokens of all entries.
        nbytes: Bytes that count against the budget.
        max_bytes: The budget, or None.
        pinned: Entries that are never evicted.
        hits: Documents handed out by this store object.
        misses: Documents it was asked for and did not have.
        evictions: Entries it has dropped to stay within its budget.
        corrupt: Entries it has set aside because they could not be trusted.
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
    """Prefilled documents by content.

    A document goes in as [ifkv.prefill_documents][] made it, alone behind its prefix; the
    prefix's own rows are an entry of their own, stored once for all documents behind it. Stores may
    be used by several threads. A document is present when both it and its prefix are.
    """

    def key_for(
        self,
        model: PreTrainedModel,
        token_ids: Sequence[int] | Tensor,
        prefix: Sequence[int] | Tensor | DocumentCache = (),
    ) -> str:
        """The key of a document, whether or not the store holds it.

        Args:
            model: A patched model.
            token_ids: The document's tokens, ``[n]``.
            prefix: The tokens it is encoded behind.

        Returns:
            64 hex digits.
        """
        ...

    def put(self, document: DocumentCache, *, replace: bool = False) -> str:
        """Store a document and, once, its prefix; one that is there already is only marked as used.

        Args:
            document: The document.
            replace: Let it take the place of the one under its key, for instance because it has
                sensitivities; until it does, that one stays.

        Returns:
            Its key.

        Raises:
            StoreFullError: It does not fit; nothing was stored.
            InvalidInputError: The document contradicts itself.
        """
        ...

    def get(self, key: str, *, lazy: bool = False) -> DocumentCache:
        """The document under a key; its ``.prefix`` is shared by all documents behind it.

        Args:
            key: What `put` or `key_for` returned.
            lazy: Read layers when they are first needed, where the store can; ``stitch`` then
                reads ahead in the background.

        Raises:
            DocumentNotFoundError: It is not there; a ``KeyError`` too.
            StoreCorruptionError: What is there cannot be trusted: prefill the document again and
                put it, which replaces it.
            StoreUnavailableError: What is there cannot be had now. It may be sound.
        """
        ...

    def touch(self, key: str) -> None:
        """Count a use of a document that was read elsewhere, from a faster tier, if it is there."""
        ...

    def __contains__(self, key: object) -> bool: ...

    def __len__(self) -> int: ...

    def delete(self, key: str) -> None:
        """Drop an entry; dropping a prefix drops the documents behind it too.

        Raises:
            DocumentNotFoundError: There is no such entry.
        """
        ...

    def keys(self) -> Iterator[str]:
        """Keys of all entries, prefixes included, least recently used first where that is known."""
        ...

    def stats(self) -> StoreStats:
        """What the store holds and has done."""
        ...
