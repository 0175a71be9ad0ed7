"""Recorders: capture a sequence of launches as several CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class Graph(Protocol):
    """Launches that can be repeated: a CUDA graph, or a stand-in in the tests."""

    def replay(self) -> None:
        """Repeat the launches on the current stream."""


class Recorder(Protocol):
    """Captures launches in graphs, which are replayed in the order of their capture."""

    def recording(self) -> AbstractContextManager[None]:
        """Return a context in which `begin` and `end` may be called."""
        ...

    def begin(self) -> None:
        """Begin a graph: from now on launches are recorded and not made."""

    def end(self) -> Graph:
        """End the graph and return it: the launches since `begin`."""
        ...


class CudaRecorder:
    """Captures CUDA graphs that share one pool of memory.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._open: torch.cuda.CUDAGraph | None = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Open a context on a separate stream, which captures need; see `Recorder.recording`."""
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
        """Begin a graph; see `Recorder.begin`."""
        self._open = torch.cuda.CUDAGraph()
        # Launches of other threads must not break this capture.
        self._open.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Graph:
        """End the graph and return it; see `Recorder.end`."""
        graph, self._open = self._open, None
        assert graph is not None
        graph.capture_end()
        return graph

    def _abandon(self) -> None:
        with contextlib.suppress(RuntimeError):  # the error in flight may have broken the capture
            self.end()
