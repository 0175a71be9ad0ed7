"""Tiers: a fast store before a slow one, such as memory before disk, disk before remote."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ifkv.documents.cache import DocumentCache
from ifkv.errors import (
    DocumentNotFoundError,
    DocumentUnreadableError,
    StoreError,
    StoreFullError,
)
from ifkv.store.keys import key_for
from ifkv.store.lazy import StoredDocument
from ifkv.store.protocol import DocumentStore, StoreStats
from ifkv.utils.copying import Uncopied

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.documents.surrogate import SurrogateContext, Texts


class TieredStore(Uncopied):
    """Store of two tiers: puts go to both; documents found only in the slow one move up.

    Tiers nest: ``TieredStore(MemoryStore(...), TieredStore(DiskStore(...), RemoteStore(...)))``.

    Args:
        fast: Asked first; may hold less than all.
        slow: Holds everything; what it loses is lost.
    """

    _instead = "make another of the same kind: TieredStore(MemoryStore(), DiskStore(path))"

    def __init__(self, fast: DocumentStore, slow: DocumentStore):
        self.fast = fast
        self.slow = slow

    def key_for(
        self,
        model: PreTrainedModel,
        token_ids: Sequence[int] | Tensor,
        prefix: Sequence[int] | Tensor | DocumentCache = (),
        surrogate: SurrogateContext | Texts | None = None,
    ) -> str:
        """Return the key of a document; see `DocumentStore`."""
        return key_for(model, token_ids, prefix, surrogate)

    def put(self, document: DocumentCache, *, replace: bool = False) -> str:
        """Store a document in both tiers; only in the slow one if the fast one has no room."""
        key = self.slow.put(document, replace=replace)
        if replace:  # or the fast tier would keep the old one if the new one does not fit
            with contextlib.suppress(DocumentNotFoundError):
                self.fast.delete(key)
        self.promote(document)
        return key

    def get(self, key: str, *, lazy: bool = False) -> DocumentCache:
        """Return the document under a key; from the slow tier it moves up once it is read whole."""
        if key in self.fast:
            # If it is evicted just now, or cannot be read, the slow tier has it.
            with contextlib.suppress(DocumentNotFoundError, DocumentUnreadableError):
                document = self.fast.get(key, lazy=lazy)
                self.slow.touch(key)  # or the slow tier would evict what is used most
                return document
        document = self.slow.get(key, lazy=lazy)
        if isinstance(document, StoredDocument):
            document.when_read(self.promote)
        else:
            self.promote(document)
        return document

    def promote(self, document: DocumentCache) -> None:
        """Put a document that the slow tier has into the fast one, if there is room."""
        with contextlib.suppress(StoreFullError):
            self.fast.put(document)

    def touch(self, key: str) -> None:
        """Record a use in both tiers."""
        self.fast.touch(key)
        self.slow.touch(key)

    def pin(self, key: str, pinned: bool = True) -> None:
        """Protect an entry of the slow tier from eviction, or end the protection.

        Raises:
            DocumentNotFoundError: There is no such entry.
            StoreError: The slow tier evicts nothing, and has no pins.
        """
        pin = getattr(self.slow, "pin", None)
        if pin is None:
            raise StoreError(f"a {type(self.slow).__name__} evicts nothing, so it has no pins.")
        pin(key, pinned)

    def __contains__(self, key: object) -> bool:
        return key in self.fast or key in self.slow

    def __len__(self) -> int:
        return sum(1 for _ in self.keys())

    def delete(self, key: str) -> None:
        """Delete an entry from both tiers.

        Raises:
            DocumentNotFoundError: Neither has it.
        """
        found = False
        for tier in (self.fast, self.slow):
            with contextlib.suppress(DocumentNotFoundError):
                tier.delete(key)
                found = True
        if not found:
            raise DocumentNotFoundError(f"no document {key} to delete in either tier.")

    def keys(self) -> Iterator[str]:
        """Return the keys of the slow tier, then those that only the fast tier has."""
        slow = list(self.slow.keys())
        held = set(slow)
        return iter(slow + [key for key in list(self.fast.keys()) if key not in held])

    def stats(self) -> StoreStats:
        """Return the slow tier's numbers, with the hits and corrupt entries of both tiers."""
        fast, slow = self.fast.stats(), self.slow.stats()
        return dataclasses.replace(
            slow, hits=fast.hits + slow.hits, corrupt=fast.corrupt + slow.corrupt
        )
