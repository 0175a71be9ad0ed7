"""CUDA graphs without a GPU: records operations instead of launches, and repeats them on demand.

Obeys what captures rest on: a graph works on the tensors it was made with, in place; nothing may
wait for the host while it is made; graphs do not nest; and nothing is computed at replay but what
was noted. What has been noted is also computed at once, since torch wants tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class GraphStandIn:
    """Operations, and the tensors that they gave when noted."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                # A view shows what is there by now; what was changed in place has been changed.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Noting(TorchDispatchMode):
    def __init__(self, graph: GraphStandIn):
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        made = func(*args, **(kwargs or {}))
        self._graph.steps.append((func, args, kwargs or {}, made))
        return made


class RecorderStandIn:
    """A `Recorder`."""

    def __init__(self, device: torch.device):
        self.graphs: list[GraphStandIn] = []
        self._mode: _Noting | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._mode is not None:
                self._mode.__exit__(None, None, None)

    def begin(self) -> None:
        assert self._mode is None, "graphs do not nest"
        self.graphs.append(GraphStandIn())
        self._mode = _Noting(self.graphs[-1])
        self._mode.__enter__()

    def end(self) -> GraphStandIn:
        assert self._mode is not None, "nothing has been begun"
        self._mode.__exit__(None, None, None)
        self._mode = None
        return self.graphs[-1]
