"""Planned calls of FlashInfer: their index arrays are made once and run in every layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ifkv.backends.flashinfer.pages import PagedBuffers, page_table
from ifkv.backends.flashinfer.shapes import CallShape
from ifkv.backends.flashinfer.tiles import TILE_ROWS, CallKind, Part, mask_of_parts
from ifkv.backends.flashinfer.variant import position_variant
from ifkv.backends.flashinfer.wrappers import WrapperKind, WrapperPool
from ifkv.backends.plans import UNSCALED, KVScales
from ifkv.errors import InvalidInputError

_T = TypeVar("_T")

# Offsets into a mask are int32, and FlashInfer does not check them.
MASK_LIMIT = 2**31
# Multiprocessors of a Hopper GPU, rounded to a power of two; fewer tiles leave some of them idle.
MULTIPROCESSORS = 128


def kernels(rows: Sequence[int], heads: int, *, masked: bool = False) -> str:
    """Return the name of the fastest FlashInfer kernels for a call.

    On Hopper, ``"auto"`` means fa3, which is 1.7 times as fast as fa2 (H100). But fa3 fills a tile
    with rows of one head, and never splits a request's keys between multiprocessors. Few rows, such
    as a prompt or a decoding step, are faster in fa2, which puts all query heads of a key head into
    one tile and splits the keys. On other GPUs both names mean fa2.

    Args:
        rows: Rows of each request.
        heads: Query heads.
        masked: True if the call has a mask, which fa3 does not support.
    """
    tiles = sum(-(-count // TILE_ROWS) for count in rows)
    filled = 2 * sum(rows) >= tiles * TILE_ROWS
    return "auto" if filled and not masked and tiles * heads >= MULTIPROCESSORS else "fa2"


class Planned:
    """Calls of one forward, planned in the first layer that needs them and then reused."""

    def __init__(self) -> None:
        self._calls: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], _T]) -> _T:
        """Return the result of ``make`` for this key; call it only once."""
        if key not in self._calls:
            self._calls[key] = make()
        found: _T = self._calls[key]
        return found


class Rows:
    """Rows of one call among the rows of a forward, as a slice if they are adjacent.

    Args:
        ranges: First row and end of each run of rows.
        device: The compute device.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]], device: torch.device):
        self.count = sum(stop - start for start, stop in ranges)
        joined = all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
        self.index: slice | Tensor
        if joined:
            self.index = slice(ranges[0][0], ranges[-1][1]) if ranges else slice(0, 0)
        else:
            index = torch.cat([torch.arange(*pair) for pair in ranges])
            self.index = index.to(device, non_blocking=True)

    def take(self, x: Tensor) -> Tensor:
        """Return these rows of ``x``."""
        return x[self.index]

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Set these rows of ``x``."""
        x[self.index] = rows


class Call:
    """Planned call: rows of a forward over spans of paged sequences.

    Args:
        pool: Pool that lends the wrapper.
        kind: Masking of the call: none, causal, or by a mask.
        parts: Rows and span of each request in the call; their rows are concatenated.
        tables: Page table of each sequence: its pages in order, int32 on the CPU.
        shape: Heads, dtypes and other sizes.
        row_positions: Positions of all rows of the forward, long ``[rows]``, on the compute device.
        key_positions: Positions of each sequence's slots, long ``[slots]``; the slots if None.
        by_position: Use ifkv's kernel, which compares positions instead of reading a mask.
    """

    def __init__(
        self,
        pool: WrapperPool,
        kind: CallKind,
        parts: Sequence[Part],
        tables: Sequence[Tensor],
        shape: CallShape,
        row_positions: Tensor,
        key_positions: Sequence[Tensor] | None = None,
        by_position: bool = False,
    ):
        device = row_positions.device
        self.rows = Rows([(part.start, part.stop) for part in parts], device)
        sizes = [part.stop - part.start for part in parts]
        jit_args = position_variant(shape) if by_position else None
        lease = pool.lease(
            WrapperKind(
                paged=True,
                backend=kernels(sizes, shape.heads, masked=kind == "masked"),
                q_dtype=shape.q_dtype,
                kv_dtype=shape.kv_dtype,
                head_dim=shape.head_dim,
                jit_args=jit_args,
                jit_name=jit_args[0] if jit_args else "",
            ),
            device,
            holder=self,
        )
        self._wrapper = lease.wrapper
        table = page_table(
            tables, [(part.sequence, part.begin, part.end) for part in parts], shape.page_size
        )
        mask: dict[str, Tensor] = {}
        self._by_position: tuple[Tensor, Tensor] | None = None
        self._shape = shape
        if by_position:
            # The kernel masks only if it is given a mask; this byte is never read.
            mask["packed_custom_mask"] = torch.zeros(1, dtype=torch.uint8, device=device)
            begins = torch.tensor([part.begin for part in parts], dtype=torch.int32)
            self._by_position = (
                self.rows.take(row_positions).to(torch.int32),
                begins.to(device, non_blocking=True),
            )
        elif kind == "masked":
            size = sum((part.stop - part.start) * (part.end - part.begin) for part in parts)
            if size >= MASK_LIMIT:
                raise InvalidInputError(
                    f"{self.rows.count} rows would need a mask of {size} elements, and FlashInfer "
                    f"can address {MASK_LIMIT - 1}. Pass block_tokens to recompute."
                )
            mask["custom_mask"] = mask_of_parts(parts, row_positions, key_positions, shape.spec)
        lease.plan(
            qo_indptr=torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32),
            paged_kv_indptr=table.indptr,
            paged_kv_indices=table.indices,
            paged_kv_last_page_len=table.last_page_len,
            page_size=shape.page_size,
            causal=kind == "causal",
            # Without it FlashInfer would loop over the requests to find it.
            max_token_per_sequence=max(sizes),
            **shape.plan_arguments,
            **mask,
        )

    def run(
        self, query: Tensor, buffers: PagedBuffers, scales: KVScales = UNSCALED
    ) -> tuple[Tensor, Tensor]:
        """Compute the attention of the call's rows.

        Args:
            query: ``[rows of the forward, heads, head_dim]``.
            buffers: Keys and values of the layer.
            scales: Scales of keys and values.

        Returns:
            ``[rows of the call, heads, head_dim]`` and base-2 log-sum-exp ``[rows, heads]``.
        """
        extra: tuple[Any, ...] = ()
        if self._by_position is not None:
            # ifkv's kernel takes the scaling as an argument, so FlashInfer cannot apply k_scale.
            scaling = self._shape.scaling * scales.keys
            window = self._shape.window
            extra = (*self._by_position, scaling, -1 if window is None else window)
        # Other rows run without scales: a release might treat a scale of 1 differently.
        rescaled = {} if scales == UNSCALED else {"k_scale": scales.keys, "v_scale": scales.values}
        rows = self.rows.take(query)
        out, logsumexp = self._wrapper.run(
            rows,
            (buffers.keys, buffers.values),
            *extra,
            # FlashInfer would set its own buffer to zero, for requests without keys; none are here.
            out=torch.empty(rows.shape, dtype=rows.dtype, device=rows.device),
            return_lse=True,
            **rescaled,
        )
        return out, logsumexp
