"""Position-causal rows of one forward: their calls, and the merging of the results."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ifkv.backends.flashinfer.calls import Call, Planned
from ifkv.backends.flashinfer.pages import PagedBuffers
from ifkv.backends.flashinfer.shapes import CallShape
from ifkv.backends.flashinfer.tiles import MaskForm, parts_of_rows
from ifkv.backends.flashinfer.wrappers import WrapperPool
from ifkv.backends.plans import KVScales


@dataclasses.dataclass(frozen=True)
class RowDetail:
    """Data of a row plan of this backend.

    Attributes:
        slots: Slots of each sequence's rows, long on the CPU.
        kv_lengths: Slots in use of each sequence.
        tables: Page table of each sequence; None if the pages are those of a buffer.
        planned: Calls planned so far.
    """

    slots: tuple[Tensor, ...]
    kv_lengths: tuple[int, ...]
    tables: tuple[Tensor, ...] | None
    planned: Planned

    def pages_of(self, first_pages: tuple[int, ...], page_size: int) -> tuple[Tensor, ...]:
        """Return the page table of each sequence: its pages in order, int32 on the CPU."""
        if self.tables is not None:
            return self.tables
        return tuple(
            torch.arange(first, first + -(-length // page_size), dtype=torch.int32)
            for first, length in zip(first_pages, self.kv_lengths, strict=True)
        )


class RowCalls:
    """Planned calls of one forward's rows.

    Args:
        module: FlashInfer.
        pool: Pool that lends the wrappers.
        detail: Slots and pages of the rows.
        row_slots: Slots of all rows, long ``[rows]``, on the compute device.
        shape: Heads, dtypes and other sizes.
        first_pages: First page of each sequence, as in `PagedBuffers`.
        form: Masking of rows that share no causal mask.
    """

    def __init__(
        self,
        module: Any,
        pool: WrapperPool,
        detail: RowDetail,
        row_slots: Tensor,
        shape: CallShape,
        first_pages: tuple[int, ...],
        form: MaskForm,
    ):
        self._module = module
        tables = detail.pages_of(first_pages, shape.page_size)
        parts = parts_of_rows(detail.slots, shape.group, shape.page_size, shape.window)
        self._calls = {
            kind: Call(
                pool,
                kind,
                some,
                tables,
                shape,
                row_slots,
                by_position=form == "positions" and kind == "masked",
            )
            for kind, some in parts.items()
            if some
        }

    def run(self, rows: Tensor, buffers: PagedBuffers, scales: KVScales) -> Tensor:
        """Compute the attention of all rows, ``[rows, heads, head_dim]``.

        Args:
            rows: Queries of the same shape.
            buffers: Keys and values of the layer.
            scales: Scales of keys and values.
        """
        states = [
            (call, *call.run(rows, buffers, scales))
            for call in (self._calls.get("causal"), self._calls.get("masked"))
            if call is not None
        ]
        if not states:
            return torch.empty_like(rows)
        if len(states) == 1:
            [(_, out, logsumexp)] = states
        else:
            out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
            logsumexp = states[0][2].new_empty(rows.shape[:2])
            for call, part, its_logsumexp in states:
                call.rows.put(out, part)
                call.rows.put(logsumexp, its_logsumexp)
        full = self._calls.get("full")
        if full is None:
            return out
        # Merge the keys that some rows see without a mask. FlashInfer's merge_state_in_place cannot
        # be used: its threads read and write one log-sum-exp without a barrier.
        own = full.rows.take(out), full.rows.take(logsumexp)
        merged, _ = self._module.merge_state(*own, *full.run(rows, buffers, scales))
        full.rows.put(out, merged)
        return out
