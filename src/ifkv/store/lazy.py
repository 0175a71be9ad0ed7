"""Lazy documents: rows stay in the store until they are needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ifkv.documents.cache import DocumentCache
from ifkv.store.document_reader import DocumentReader, allocate
from ifkv.store.format import Header

ReadLayer = Callable[[int, Tensor], None]


class StoredDocument(DocumentCache):
    """Document cache whose keys and values are read from a store when they are first used.

    [ifkv.stitch][] reads it a layer at a time, ahead of the computation, and keeps no layer. Asking
    for `keys` or `values` reads it whole, once.

    Args:
        reader: The file.
        read_layer: Reads a layer into ``[2, kv_heads, n, head_dim]``, with the store's checks, and
            raises the store's errors.
        prefix: The prefix's rows.
        distant: Whether reading waits for a network, not for a disk.
    """

    _header: Header
    _read_layer: ReadLayer
    _lock: threading.Lock
    _rows: Tensor | None
    _read: set[int]
    _then: Callable[[DocumentCache], None] | None
    _distant: bool

    def __init__(
        self,
        reader: DocumentReader,
        read_layer: ReadLayer,
        prefix: DocumentCache | None,
        *,
        distant: bool = False,
    ):
        # The base is frozen; its fields keys and values are properties here.
        for name, value in (
            ("token_ids", reader.token_ids),
            ("prefix_ids", reader.prefix_ids),
            ("fingerprint", reader.header.fingerprint),
            ("prefix", prefix),
            ("sensitivity", reader.sensitivity),
            ("surrogate", reader.surrogate),
            ("_header", reader.header),
            ("_read_layer", read_layer),
            ("_lock", threading.Lock()),
            ("_rows", None),
            ("_read", set()),
            ("_then", None),
            ("_distant", distant),
        ):
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return ``(layers, kv_heads, n, head_dim)``."""
        return self._header.shape

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of keys and values."""
        return self._header.dtype

    @property
    def keys(self) -> Tensor:
        """Return all keys, ``[layers, kv_heads, n, head_dim]``."""
        return self._all()[:, 0]

    @property
    def values(self) -> Tensor:
        """Return all values, ``[layers, kv_heads, n, head_dim]``."""
        return self._all()[:, 1]

    @property
    def nbytes(self) -> int:
        """Return the bytes of keys and values once they are read."""
        layers, kv_heads, length, head_dim = self.shape
        return 2 * layers * kv_heads * length * head_dim * self.dtype.itemsize

    @property
    def lazy(self) -> bool:
        """True if layers are still to be read."""
        return len(self._read) < self.shape[0]

    @property
    def distant(self) -> bool:
        """True if reading waits for a network, so that many parallel reads are faster."""
        return self._distant

    def whole(self) -> DocumentCache:
        """Return the same document, in memory and independent of its store."""
        return self.rebuilt()

    def when_read(self, then: Callable[[DocumentCache], None]) -> None:
        """Keep layers that are read, and call a function with the whole document after the last."""
        object.__setattr__(self, "_then", then)

    def layer(self, layer: int, *, pin_memory: bool = False) -> Tensor:
        """Read the keys and values of one layer; they are kept only after `when_read`.

        Args:
            layer: The layer's number.
            pin_memory: Read into page-locked memory.

        Returns:
            ``[2, kv_heads, n, head_dim]``, on the CPU.

        Raises:
            StoreCorruptionError: The layer cannot be trusted.
            StoreUnavailableError: It cannot be read now.
        """
        if self._rows is None and self._then is None:
            out = _room((2, *self.shape[1:]), self.dtype, pin_memory)
            self._read_layer(layer, out)
            return out
        rows = self._room(pin_memory)
        self._fill(rows, [layer])
        return rows[layer]

    def _all(self) -> Tensor:
        rows = self._room(False)
        self._fill(rows, range(self.shape[0]))
        return rows

    def _room(self, pin_memory: bool) -> Tensor:
        with self._lock:
            if self._rows is None:
                layers, *rest = self.shape
                rows = _room((layers, 2, *rest), self.dtype, pin_memory)
                object.__setattr__(self, "_rows", rows)
            rows_there = self._rows
        assert rows_there is not None
        return rows_there

    def _fill(self, rows: Tensor, layers: Iterable[int]) -> None:
        """Read missing layers; two threads may read one twice, with equal bytes."""
        for layer in layers:
            if layer not in self._read:
                self._read_layer(layer, rows[layer])
                with self._lock:
                    self._read.add(layer)
        then = None
        with self._lock:
            if len(self._read) == self.shape[0]:
                then = self._then
                object.__setattr__(self, "_then", None)
        if then is not None:
            then(self.whole())

    def __repr__(self) -> str:
        state = f"{len(self._read)} of {self.shape[0]} layers read"
        return (
            f"StoredDocument({len(self)} tokens behind {len(self.prefix_ids)}, "
            f"{self.nbytes / 2**20:.1f} MiB, {self.dtype}, {self.fingerprint[:8]}, {state})"
        )


def _room(shape: tuple[int, ...], dtype: torch.dtype, pin_memory: bool) -> Tensor:
    return (
        torch.empty(shape, dtype=dtype, pin_memory=True) if pin_memory else allocate(shape, dtype)
    )
