"""Pool of FlashInfer's wrappers and workspaces: built once, each lent to one plan at a time.

A wrapper holds its last plan, so two plans in use need two wrappers. The pool keeps and reuses
them. The large workspace is scratch memory of a run. Wrappers whose runs are ordered, that is, on
one CUDA stream, may share it, so everything is kept per device and stream.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

# The workspace holds parts of long rows; FlashInfer's authors recommend at least 128 MiB.
WORKSPACE_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class WrapperKind:
    """Kind of a wrapper; wrappers of one kind are interchangeable.

    Attributes:
        paged: True if keys are in pages, False if they are ragged.
        backend: FlashInfer's name for the kernels: ``"fa2"``, the only ones that take a mask, or
            ``"auto"``. A wrapper resolves ``"auto"`` at its first plan and never again, so dtypes
            and head_dim are part of the kind.
        q_dtype: Dtype of queries.
        kv_dtype: Dtype of keys and values.
        head_dim: Dimension of queries, keys and values.
        jit_args: Source and arguments of ifkv's kernel; None for a stock kernel.
        jit_name: Name of ifkv's kernel; empty for a stock kernel.
    """

    paged: bool
    backend: str
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    head_dim: int
    jit_args: tuple[Any, ...] | None = dataclasses.field(default=None, compare=False)
    jit_name: str = ""


class Lease:
    """Exclusive use of a wrapper until it is returned to the pool."""

    def __init__(self, wrapper: Any, device: torch.device):
        self.wrapper = wrapper
        self._planned = torch.cuda.Event() if device.type == "cuda" else None

    def plan(self, **arguments: Any) -> None:
        """Plan the wrapper again."""
        if self._planned is not None:
            # The last plan may still be on its way from the wrapper's pinned memory to the device,
            # and a new plan overwrites that memory.
            self._planned.synchronize()
        self.wrapper.plan(**arguments)
        if self._planned is not None:
            self._planned.record()


class WrapperPool:
    """Pool of wrappers by kind, device and stream.

    Args:
        module: FlashInfer.
        workspace_bytes: Size of the workspace, one per device and stream.
    """

    def __init__(self, module: Any, workspace_bytes: int = WORKSPACE_BYTES):
        self._module = module
        self._workspace_bytes = workspace_bytes
        self._workspaces: dict[Hashable, Tensor] = {}
        self._free: defaultdict[Hashable, deque[Lease]] = defaultdict(deque)
        # Reentrant, because the garbage collector may return a lease while this thread takes one.
        self._lock = threading.RLock()

    def lease(self, kind: WrapperKind, device: torch.device, holder: object) -> Lease:
        """Lend a wrapper for as long as ``holder`` lives."""
        stream = _stream_of(device)
        key = (kind, stream)
        with self._lock:
            free = self._free[key]
            lease = free.popleft() if free else Lease(self._build(kind, device, stream), device)
        weakref.finalize(holder, self._return, key, lease)
        return lease

    def _return(self, key: Hashable, lease: Lease) -> None:
        with self._lock:
            self._free[key].append(lease)

    def _build(self, kind: WrapperKind, device: torch.device, stream: Hashable) -> Any:
        workspace = self._workspaces.get(stream)
        if workspace is None:
            workspace = torch.empty(self._workspace_bytes, dtype=torch.uint8, device=device)
            self._workspaces[stream] = workspace
        if not kind.paged:
            ragged = self._module.BatchPrefillWithRaggedKVCacheWrapper
            return ragged(workspace, kv_layout="NHD", backend=kind.backend)
        paged = self._module.BatchPrefillWithPagedKVCacheWrapper
        jit_args = None if kind.jit_args is None else list(kind.jit_args)
        return paged(workspace, kv_layout="HND", backend=kind.backend, jit_args=jit_args)


def _stream_of(device: torch.device) -> Hashable:
    """Return the key of ordered runs on this device: its current stream, or this thread."""
    if device.type == "cuda":
        return device, torch.cuda.current_stream(device).cuda_stream
    return device, threading.get_ident()
