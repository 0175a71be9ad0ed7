"""Loading of stored documents into a stitched cache: layer by layer, ahead of their use.

Background threads read the next layers, and check them if the store asks for it, while the current
one is rotated, scored or recomputed. On CUDA they read into page-locked memory and copy on a
separate stream; the computation's stream waits only for the copy of the layer that it needs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ifkv.backends.fp8 import FLOAT8
from ifkv.backends.plans import KVScales
from ifkv.cache.fp8_layer import place_rounded
from ifkv.documents.cache import DocumentCache
from ifkv.models.rope import place

# Threads that read: enough for a disk's queue, few beside those that compute.
THREADS = max(1, min(4, (os.cpu_count() or 1) // 2))
# Threads that wait for a network, which answers many requests at once.
DISTANT_THREADS = 16
# Memory for layers that have been read and not used yet; two layers are read ahead in any case.
AHEAD_BYTES = 256 * 2**20


class LayerLoader:
    """Loader that fills the buffers of a stitched cache, layers in order, when `ensure` asks.

    Attributes:
        wait_seconds: Seconds that `ensure` has waited for reads: the cost of loading that no other
            work has hidden.
        scales: Scales of the FP8 layers placed so far; empty if rows are not quantized.

    Args:
        parts: Prefix and documents, in the cache's order.
        keys: Buffer ``[layers, 1, kv_heads, capacity, head_dim]`` to be filled from slot 0; rows
            are quantized if it is float8.
        values: As keys.
        cos: ``[T, rotary_dim]``, of the parts' slots.
        sin: As cos.
    """

    def __init__(
        self, parts: Sequence[DocumentCache], keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor
    ):
        self._parts = parts
        self._keys, self._values = keys, values
        self._cos, self._sin = cos, sin
        self._depth = keys.shape[0]
        self.scales: list[KVScales] = []
        self._placed = 0
        self._submitted = 0
        self._failure: BaseException | None = None
        self._lock = threading.RLock()
        self._stream: Any = None
        if keys.is_cuda:
            self._stream = torch.cuda.Stream(keys.device)
        layer_bytes = sum(part.nbytes for part in parts) // self._depth
        self._ahead = max(2, AHEAD_BYTES // max(1, layer_bytes))
        self._reads: dict[int, list[Future[tuple[Tensor, Any]] | None]] = {}
        self._threads: ThreadPoolExecutor | None = ThreadPoolExecutor(
            DISTANT_THREADS if any(part.distant for part in parts) else THREADS, "ifkv-load"
        )
        self.wait_seconds = 0.0
        self._read_ahead()

    def ensure(self, layer: int) -> None:
        """Return when the buffers hold a layer, and all before it.

        Raises:
            DocumentUnreadableError: A document cannot be trusted, or cannot be read now; discard
                this cache.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            try:
                while self._placed <= layer:
                    self._place(self._placed)
                    self._placed += 1
                    self._read_ahead()
                if self._placed == self._depth:
                    self._parts = ()  # lets files be closed
            except BaseException as error:
                self._failure = error
                self._finish()
                raise

    def _read_ahead(self) -> None:
        """Submit reads to the threads, as far ahead as memory allows."""
        until = min(self._depth, self._placed + self._ahead)
        for layer in range(self._submitted, until):
            assert self._threads is not None
            self._reads[layer] = [
                self._threads.submit(self._fetch, part, layer) if part.lazy else None
                for part in self._parts
            ]
        self._submitted = until
        if until == self._depth:
            self._finish()

    def _finish(self) -> None:
        """Shut the threads down once their reads are done."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=self._failure is not None)
            self._threads = None

    def _fetch(self, part: DocumentCache, layer: int) -> tuple[Tensor, Any]:
        """Read a layer in a thread; return its rows and the event after which they may be used."""
        rows = part.layer(layer, pin_memory=self._stream is not None)
        if self._stream is None:
            return rows, None
        with torch.cuda.stream(self._stream):
            moved = rows.to(self._keys.device, non_blocking=True)
            return moved, self._stream.record_event()

    @torch.no_grad()
    def _place(self, layer: int) -> None:
        """Wait for a layer's reads and rotate them into their slots."""
        reads = self._reads.pop(layer)
        arriving = (
            self._arrived(part, read, layer) for part, read in zip(self._parts, reads, strict=True)
        )
        keys, values = self._keys[layer, 0], self._values[layer, 0]
        if keys.dtype == FLOAT8:
            rows = [(part[0], part[1]) for part in arriving]
            self.scales.append(place_rounded(rows, self._cos, self._sin, keys, values))
            return
        slot = 0
        for part in arriving:
            own = slice(slot, slot + part.shape[-2])
            turn = self._cos[own], self._sin[own]
            place(part[0][None], part[1][None], *turn, keys[None], values[None], slot)
            slot = own.stop

    def _arrived(
        self, part: DocumentCache, read: Future[tuple[Tensor, Any]] | None, layer: int
    ) -> Tensor:
        """Wait for a part's rows of a layer, ``[2, kv_heads, n, head_dim]`` on the device."""
        if read is None:
            return part.layer(layer).to(self._keys.device, non_blocking=True)
        start = time.perf_counter()
        rows, event = read.result()
        self.wait_seconds += time.perf_counter() - start
        if event is not None:
            current = torch.cuda.current_stream(self._keys.device)
            current.wait_event(event)
            rows.record_stream(current)
        return rows
