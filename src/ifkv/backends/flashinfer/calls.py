"""One planned call of FlashInfer: index arrays made once per forward, run once per layer."""

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
# Of a Hopper card, to the nearest power of two: tiles below that leave some of them idle.
MULTIPROCESSORS = 128


def kernels(rows: Sequence[int], heads: int, *, masked: bool = False) -> str:
    """Which of FlashInfer's kernels a call is best run by.

    On Hopper, ``"auto"`` is fa3, which computes 1.7 times as fast as fa2 (H100) but fills a tile
    with rows of one head and never shares a request's keys between multiprocessors. Few rows, a
    prompt or a decoding step, are faster by fa2, which puts the query heads of a key head into one
    tile and splits the keys. Elsewhere both are fa2.

    Args:
        rows: Of each request.
        heads: Query heads.
        masked: fa3 takes no masks.
    """
    tiles = sum(-(-count // TILE_ROWS) for count in rows)
    filled = 2 * sum(rows) >= tiles * TILE_ROWS
    return "auto" if filled and not masked and tiles * heads >= MULTIPROCESSORS else "fa2"


class Planned:
    """Calls of one forward, planned when the first layer shows its shape, then looked up."""

    def __init__(self) -> None:
        self._calls: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], _T]) -> _T:
        """What ``make`` returned for this key."""
        if key not in self._calls:
            self._calls[key] = make()
        found: _T = self._calls[key]
        return found


class Rows:
    """Some of the rows of a forward, in the order of a call: a slice where they are adjacent.

    Args:
        ranges: First row and end of each stretch.
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
        """These rows of ``x``."""
        return x[self.index]

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Set these rows of ``x``."""
        x[self.index] = rows


class Call:
    """Requests that run together: rows of a forward over spans of paged sequences.

    Args:
        pool: Where to get a wrapper.
        kind: What is hidden: nothing, the causal future, or what a mask says.
        parts: What each request reads; their rows follow one another in the call.
        tables: For each sequence its pages in order, int32 on the CPU.
        shape: Heads, dtypes and so on.
        row_positions: Long ``[rows]`` of the forward, on the compute device.
        key_positions: For each sequence long ``[slots]``; a slot is its position if None.
        by_position: Let our own kernel compare positions instead of reading a mask.
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
            # The kernel has to be told that it masks at all; this byte is never read.
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
            # FlashInfer would find it out itself, one request after the other.
            max_token_per_sequence=max(sizes),
            **shape.plan_arguments,
            **mask,
        )

    def run(
        self, query: Tensor, buffers: PagedBuffers, scales: KVScales = UNSCALED
    ) -> tuple[Tensor, Tensor]:
        """Attention of the call's rows.

        Args:
            query: ``[rows of the forward, heads, head_dim]``.
            buffers: Keys and values of the layer.
            scales: Of keys and values.

        Returns:
            ``[rows of the call, heads, head_dim]`` and base-2 log-sum-exp ``[rows, heads]``.
        """
        extra: tuple[Any, ...] = ()
        if self._by_position is not None:
            # Our kernel is given its scale by us, so FlashInfer cannot work k_scale into it.
            scaling = self._shape.scaling * scales.keys
            window = self._shape.window
            extra = (*self._by_position, scaling, -1 if window is None else window)
        # Plain rows are run without: one comparison less that a release might change.
        rescaled = {} if scales == UNSCALED else {"k_scale": scales.keys, "v_scale": scales.values}
        rows = self.rows.take(query)
        out, logsumexp = self._wrapper.run(
            rows,
            (buffers.keys, buffers.values),
            *extra,
            # FlashInfer's own would be set to zero first, for requests without keys: here are none.
            out=torch.empty(rows.shape, dtype=rows.dtype, device=rows.device),
            return_lse=True,
            **rescaled,
        )
        return out, logsumexp
