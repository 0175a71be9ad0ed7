"""CUDA graphs that are cut out of a stretch of launches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class Graph(Protocol):
    """Launches that can be repeated; the tests have another than CUDA's."""

    def replay(self) -> None:
        """Launch them again, on the current stream."""


class Recorder(Protocol):
    """Cuts what is launched into graphs, which are replayed in the order they were made."""

    def recording(self) -> AbstractContextManager[None]:
        """Where `begin` and `end` may be called."""
        ...

    def begin(self) -> None:
        """From here on, launches are noted and not made."""

    def end(self) -> Graph:
        """The launches since `begin`."""
        ...


class CudaRecorder:
    """Captures CUDA graphs that share one pool of memory.

    Args:
        device: The card.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._open: torch.cuda.CUDAGraph | None = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """See `Recorder.recording`; on a stream of its own, as captures have to be."""
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                try:
                    yield
                except BaseException:
                    if self._open is not None:
                        self._abandon()
                    raise
        finally:
            outside.wait_stream(self._stream)

    def begin(self) -> None:
        """See `Recorder.begin`."""
        self._open = torch.cuda.CUDAGraph()
        # What other threads do on the card meanwhile is no concern of this capture.
        self._open.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Graph:
        """See `Recorder.end`."""
        graph, self._open = self._open, None
        assert graph is not None
        graph.capture_end()
        return graph

    def _abandon(self) -> None:
        with contextlib.suppress(RuntimeError):  # broken by what is being raised
            self.end()
