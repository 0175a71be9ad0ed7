"""Store in host memory, within a byte budget."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ifkv.documents.cache import DocumentCache
from ifkv.errors import DocumentNotFoundError, InvalidInputError, StoreFullError
from ifkv.store.keys import check_document, check_key, key_for, key_of, prefix_key_of
from ifkv.store.protocol import StoreStats
from ifkv.utils.copying import Uncopied

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.documents.surrogate import SurrogateContext, Texts


class MemoryStore(Uncopied):
    """Store in host memory, which evicts the least recently used documents over its budget.

    Args:
        max_bytes: Bytes of keys and values to hold at most; None for no limit.
        pin_memory: Keep tensors in page-locked memory, from which copies to a CUDA device are
            fast and asynchronous. Needs CUDA.

    Raises:
        InvalidInputError: ``max_bytes`` is negative.

    Examples:
        >>> import ifkv
        >>> from ifkv.store import MemoryStore
        >>> from ifkv.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> handle = ifkv.patch(model)
        >>> store = MemoryStore()
        >>> key = store.put(ifkv.prefill_documents(model, [[5, 6, 7]], prefix=[1])[0])
        >>> key == store.key_for(model, [5, 6, 7], [1]), len(store.get(key)), len(store)
        (True, 3, 2)
        >>> ifkv.unpatch(model)
    """

    _instead = "share it, or keep documents on disk for others: DiskStore(path)"

    def __init__(self, max_bytes: int | None = None, *, pin_memory: bool = False):
        if max_bytes is not None and max_bytes < 0:
            raise InvalidInputError(f"max_bytes is {max_bytes}; give None or at least 0.")
        self.max_bytes = max_bytes
        self._pin_memory = pin_memory
        self._entries: OrderedDict[str, DocumentCache] = OrderedDict()  # least recent first
        self._behind: Counter[str] = Counter()  # how many documents need a prefix
        self._pinned: set[str] = set()
        self._nbytes = self._hits = self._misses = self._evictions = 0
        self._lock = threading.RLock()

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
        """Store a document and its prefix.

        Args:
            document: The document.
            replace: Replace the document under its key.

        Raises:
            StoreFullError: It does not fit into the budget; the prefix may have been stored.
            InvalidInputError: The document contradicts itself.
        """
        check_document(document)
        while document.prefix is not None:
            prefix = self._put_one(document.prefix, None)
            if self._put_one(document, prefix, replace) is not None:
                return key_of(document)
            # Another thread's put has evicted the prefix meanwhile: try again.
        self._put_one(document, None, replace)
        return key_of(document)

    def _put_one(
        self, document: DocumentCache, prefix: DocumentCache | None, replace: bool = False
    ) -> DocumentCache | None:
        """Store one document, whose prefix must be in the store.

        Returns:
            The stored document; None if the prefix is not in the store.
        """
        key, prefix_key = key_of(document), prefix_key_of(document)
        with self._lock:
            if key in self._entries and not replace:
                self._touch(key)
                return self._entries[key]
        # The copy to the host is made outside the lock; other threads go on meanwhile.
        placed = self._to_host(document, prefix)
        with self._lock:
            before = self._entries.get(key)
            if before is None or replace:
                if prefix_key is not None and self._entries.get(prefix_key) is not prefix:
                    return None
                more = placed.nbytes - (0 if before is None else before.nbytes)
                self._make_room(more, {key, prefix_key})
                self._entries[key] = placed
                self._nbytes += more
                if prefix_key is not None and before is None:
                    self._behind[prefix_key] += 1
            self._touch(key)
            return self._entries[key]

    def get(self, key: str, *, lazy: bool = False) -> DocumentCache:
        """Return the document under a key; ``lazy`` has no effect in memory."""
        check_key(key)
        with self._lock:
            document = self._entries.get(key)
            if document is None:
                self._misses += 1
                raise DocumentNotFoundError(
                    f"no document {key} in this store of {len(self._entries)}; prefill it and put "
                    "it."
                )
            self._hits += 1
            self._touch(key)
            return document

    def touch(self, key: str) -> None:
        """Record a use of a document that was read from a faster tier."""
        with self._lock:
            if key in self._entries:
                self._touch(key)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def delete(self, key: str) -> None:
        """Delete an entry, and the documents behind it if it is a prefix."""
        check_key(key)
        with self._lock:
            if key not in self._entries:
                raise DocumentNotFoundError(f"no document {key} to delete in this store.")
            if self._behind[key]:
                dependents = [k for k, d in self._entries.items() if prefix_key_of(d) == key]
                for dependent in dependents:
                    self._drop(dependent)
            self._drop(key)

    def pin(self, key: str, pinned: bool = True) -> None:
        """Protect an entry (and so its prefix) from eviction, or end the protection.

        Raises:
            DocumentNotFoundError: There is no such entry.
        """
        check_key(key)
        with self._lock:
            if key not in self._entries:
                raise DocumentNotFoundError(f"no document {key} to pin in this store.")
            (self._pinned.add if pinned else self._pinned.discard)(key)

    def keys(self) -> Iterator[str]:
        """Return the keys of all entries, least recently used first."""
        with self._lock:
            return iter(list(self._entries))

    def stats(self) -> StoreStats:
        """Return the store's numbers."""
        with self._lock:
            return StoreStats(
                documents=len(self._entries),
                tokens=sum(len(document) for document in self._entries.values()),
                nbytes=self._nbytes,
                max_bytes=self.max_bytes,
                pinned=len(self._pinned),
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
            )

    def _touch(self, key: str) -> None:
        prefix_key = prefix_key_of(self._entries[key])
        if prefix_key is not None:
            self._entries.move_to_end(prefix_key)
        self._entries.move_to_end(key)

    def _make_room(self, needed: int, keep: set[str | None]) -> None:
        """Evict the least recently used entries until ``needed`` bytes fit, or change nothing."""
        if self.max_bytes is None:
            return
        excess = self._nbytes + needed - self.max_bytes
        behind, victims = Counter(self._behind), set[str]()
        while excess > 0 and needed <= self.max_bytes:
            spare = victims | keep | self._pinned
            oldest = next((k for k in self._entries if k not in spare and not behind[k]), None)
            if oldest is None:
                break
            victims.add(oldest)
            document = self._entries[oldest]
            excess -= document.nbytes
            prefix_key = prefix_key_of(document)
            if prefix_key is not None:
                behind[prefix_key] -= 1
        if excess > 0:
            raise StoreFullError(
                f"a document of {needed} bytes does not fit into the budget of {self.max_bytes}: "
                f"{excess} bytes too many, all that can be evicted counted. Raise max_bytes, unpin "
                "entries, or split the document."
            )
        for key in victims:
            self._drop(key)
        self._evictions += len(victims)

    def _drop(self, key: str) -> None:
        document = self._entries.pop(key)
        self._pinned.discard(key)
        self._nbytes -= document.nbytes
        prefix_key = prefix_key_of(document)
        if prefix_key is not None:
            self._behind[prefix_key] -= 1

    def _to_host(self, document: DocumentCache, prefix: DocumentCache | None) -> DocumentCache:
        keys, values = document.keys.cpu(), document.values.cpu()
        if self._pin_memory:
            keys, values = keys.pin_memory(), values.pin_memory()
        return document.rebuilt(keys=keys, values=values, prefix=prefix)
