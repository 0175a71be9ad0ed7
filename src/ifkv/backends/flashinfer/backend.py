"""FlashInfer backend: the attention contract on CUDA, in float16 and bfloat16 (2501.01005).

Nothing here needs a GPU. The code makes index arrays and gives them to a module: FlashInfer, or in
the tests a stand-in that follows FlashInfer's call rules.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ifkv.backends.flashinfer.availability import INSTALL, load, refusal_of_module
from ifkv.backends.flashinfer.calls import Planned
from ifkv.backends.flashinfer.documents import DocumentCall
from ifkv.backends.flashinfer.pages import (
    PagedBuffers,
    view_as_pages,
    view_together,
)
from ifkv.backends.flashinfer.queries import QueryAttention
from ifkv.backends.flashinfer.rows import RowCalls, RowDetail
from ifkv.backends.flashinfer.shapes import CallShape
from ifkv.backends.flashinfer.tiles import MaskForm
from ifkv.backends.flashinfer.wrappers import WORKSPACE_BYTES, WrapperPool
from ifkv.backends.plans import (
    UNSCALED,
    DocumentPlan,
    KVScales,
    RowPlan,
)
from ifkv.backends.spec import AttentionSpec
from ifkv.errors import BackendUnavailableError


class FlashInferBackend(QueryAttention):
    """Attention by FlashInfer's kernels.

    Args:
        module: FlashInfer; imported if None.
        mask: Masking of rows that share no causal mask: ``"positions"``, a kernel of ifkv that
            compares positions, compiled on first use; or ``"split"``, FlashInfer's stock kernels
            with a mask that is built for every forward.
        workspace_bytes: Size of FlashInfer's workspace, one per device and stream.

    Raises:
        BackendUnavailableError: FlashInfer is not installed, cannot be imported, or lacks a
            function or argument that ifkv calls.
    """

    name = "flashinfer"

    def __init__(
        self,
        module: Any = None,
        *,
        mask: MaskForm = "positions",
        workspace_bytes: int = WORKSPACE_BYTES,
    ):
        self._module = load() if module is None else module
        refusal = refusal_of_module(self._module)
        if refusal is not None:
            raise BackendUnavailableError(f"backend 'flashinfer' cannot run: {refusal}: {INSTALL}")
        self._mask = mask
        self._pool = WrapperPool(self._module, workspace_bytes)
        self._step = threading.local()

    def plan_documents(
        self, lengths: tuple[int, ...], prefix_length: int, device: torch.device
    ) -> DocumentPlan:
        """Return a plan whose call is made in the first layer; see `Backend.plan_documents`."""
        return DocumentPlan(lengths, prefix_length, Planned())

    def attend_documents(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        prefix_keys: Tensor,
        prefix_values: Tensor,
        plan: DocumentPlan,
        spec: AttentionSpec,
    ) -> Tensor:
        """Compute attention in one ragged call; see `Backend.attend_documents`."""
        shape = CallShape.of(query, keys, 1, spec)
        call = plan.detail.once(
            shape,
            lambda: DocumentCall(self._pool, plan.lengths, plan.prefix_length, shape, query.device),
        )
        out: Tensor = call.run(query, keys, values, prefix_keys, prefix_values)
        return out

    def plan_requests(
        self,
        slots: Sequence[Tensor],
        kv_lengths: Sequence[int],
        device: torch.device,
        *,
        tables: Sequence[Tensor] | None = None,
    ) -> RowPlan:
        """Plan position-causal rows of several requests, each over its own cache, as one batch.

        Args:
            slots: Slots of each request's rows, as in `Backend.plan_requests`.
            kv_lengths: Slots in use of each request.
            device: Device of the attention.
            tables: Page table of each request for `attend_pages`: its pages in order, int32 on the
                CPU. By default request i lies in row i of a buffer.
        """
        detail = RowDetail(
            tuple(slots), tuple(kv_lengths), None if tables is None else tuple(tables), Planned()
        )
        # Non-blocking, because the GPU may still be busy with earlier rows.
        rows = torch.cat(list(slots)).to(device, non_blocking=True)
        return RowPlan(rows, max(kv_lengths, default=0), detail)

    def attend_requests(
        self,
        query: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        plan: RowPlan,
        spec: AttentionSpec,
        *,
        scales: Sequence[KVScales] | None = None,
    ) -> Tensor:
        """Compute attention in as few calls as possible; see `Backend.attend_requests`.

        Caches from [ifkv.stitch_many][] share one allocation and are read in one call. Separate
        calls are needed for other caches, if a cache has outgrown the allocation, and for FP8
        caches with different scales, because FlashInfer takes one scale per call.
        """
        detail: RowDetail = plan.detail
        scales = [UNSCALED] * len(keys) if scales is None else scales
        if len(keys) == 1:
            return self.attend_buffer(query, keys[0], values[0], plan, spec, scales=scales[0])
        buffers = view_together(keys, values, detail.kv_lengths) if len(set(scales)) == 1 else None
        if buffers is not None:
            return self.attend_pages(query, buffers, plan, spec, scales=scales[0])
        outs = []
        start = 0
        for index, (slots, length) in enumerate(zip(detail.slots, detail.kv_lengths, strict=True)):
            rows = slice(start, start + len(slots))
            start = rows.stop
            if len(slots) == 0:
                continue
            alone = detail.planned.once(
                ("alone", index),
                functools.partial(self.plan_requests, [slots], [length], query.device),
            )
            own = keys[index], values[index], alone, spec
            outs.append(self.attend_buffer(query[:, :, rows], *own, scales=scales[index]))
        return torch.cat(outs, dim=1)

    def attend_buffer(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        plan: RowPlan,
        spec: AttentionSpec,
        *,
        scales: KVScales = UNSCALED,
    ) -> Tensor:
        """Compute attention of requests whose caches are the rows of one tensor.

        Args:
            query: ``[1, heads, rows, head_dim]``, the rows of all requests concatenated.
            keys: ``[requests, kv_heads, >= kv_length, head_dim]``.
            values: Values of the same shape.
            plan: From `plan_requests`.
            spec: Scaling and mask of the layer.
            scales: Scales of keys and values.
        """
        buffers = view_as_pages(keys, values, plan.kv_length)
        return self.attend_pages(query, buffers, plan, spec, scales=scales)

    def attend_pages(
        self,
        query: Tensor,
        buffers: PagedBuffers,
        plan: RowPlan,
        spec: AttentionSpec,
        *,
        scales: KVScales = UNSCALED,
    ) -> Tensor:
        """Compute attention over pages, in the order of the plan's page tables."""
        shape = CallShape.of(query, buffers.keys, buffers.page_size, spec)
        detail: RowDetail = plan.detail
        first_pages = buffers.first_pages
        calls = detail.planned.once(
            (shape, first_pages),
            lambda: RowCalls(
                self._module, self._pool, detail, plan.slots, shape, first_pages, self._mask
            ),
        )
        return calls.run(query[0].transpose(0, 1), buffers, scales)[None]

    def decode(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        spec: AttentionSpec,
        *,
        scales: KVScales = UNSCALED,
    ) -> Tensor | None:
        """Compute one row per sequence; see `Backend.decode`.

        A plan consists of index arrays only, so all layers of a step share this thread's last plan,
        whichever cache it was made for.
        """
        sequences, _, length, _ = keys.shape
        key = (sequences, length, query.device)
        if getattr(self._step, "key", None) != key:
            self._step.plan = None  # returns its wrapper, which the new plan then takes
            last = torch.tensor([length - 1])
            self._step.plan = self.plan_requests(
                [last] * sequences, [length] * sequences, query.device
            )
            self._step.key = key
        rows = query.transpose(0, 2)  # [1, heads, sequences, head_dim]
        seen = dataclasses.replace(spec, window=None)
        out = self.attend_buffer(rows, keys, values, self._step.plan, seen, scales=scales)
        return out.transpose(0, 1)
