"""A cache's buffers seen as pages, without copying a byte, and page tables over them.

FlashInfer reads keys and values through pages: ``[pages, kv_heads, page_size, head_dim]`` with any
strides. A buffer ``[requests, kv_heads, slots, head_dim]`` is already that: a page is a stretch of
slots, its heads lie one buffer row apart, and the next request begins a whole number of pages
further on. Tiles of one request then share its pages.

Keys and values must lie alike: FlashInfer's fa3 kernels, and from 0.7 on all of them, take one set
of strides for both. Buffers of a cache do; what a model has just made need not, and is copied then.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ifkv.errors import InvalidInputError

# Slots of a page at most: what a stitched cache's capacity is rounded to.
PAGE_SIZE = 64


@dataclasses.dataclass(frozen=True)
class PagedBuffers:
    """Keys and values of one layer as pages.

    Attributes:
        keys: ``[pages, kv_heads, page_size, head_dim]``, a view.
        values: Of the same shape, a view.
        first_pages: For each request, the page that holds its slot 0; its others follow.
    """

    keys: Tensor
    values: Tensor
    first_pages: tuple[int, ...]

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.keys.shape[2]


def view_as_pages(keys: Tensor, values: Tensor, length: int) -> PagedBuffers:
    """View the first slots of a buffer as pages.

    The largest page size up to 64 is taken that the strides allow and that reads no byte outside
    the storage; a page of one slot always does.

    Args:
        keys: ``[requests, kv_heads, >= length, head_dim]``, its last dimension contiguous.
        values: Of the same shape.
        length: Slots in use.
    """
    keys, values = _alike(keys, values)
    size = min(_page_size(keys, length), _page_size(values, length))
    key_pages, first_pages = _pages(keys, length, size)
    value_pages, value_first_pages = _pages(values, length, size)
    if first_pages != value_first_pages:  # requests lie differently far apart: make them equal
        return view_as_pages(_packed(keys), _packed(values), length)
    return PagedBuffers(key_pages, value_pages, first_pages)


def view_as_slots(keys: Tensor, values: Tensor) -> PagedBuffers:
    """View one buffer as pages of a single slot, so that a request may begin at any of them.

    Args:
        keys: ``[1, kv_heads, slots, head_dim]``, its last dimension contiguous.
        values: Of the same shape.
    """
    keys, values = _alike(keys, values)
    length = keys.shape[2]
    return PagedBuffers(_pages(keys, length, 1)[0], _pages(values, length, 1)[0], (0,))


def _alike(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Both with one set of strides but for requests, the last dimension contiguous."""
    if keys.stride(-1) == 1 and keys.stride()[1:] == values.stride()[1:]:
        return keys, values
    return _packed(keys), _packed(values)


def _packed(x: Tensor) -> Tensor:
    """A copy with the strides of its shape; ``contiguous()`` leaves those of single rows alone."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def view_together(
    keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int]
) -> PagedBuffers | None:
    """View buffers of several requests as pages of one, where they lie in one allocation.

    Args:
        keys: For each request ``[1, kv_heads, >= its length, head_dim]``.
        values: Of the same shapes.
        lengths: Slots in use of each request.

    Returns:
        The pages, or None where the requests lie a broken number of pages apart or not together.
    """
    pairs = list(zip(lengths, keys, strict=True)), list(zip(lengths, values, strict=True))
    for side in pairs:
        first = side[0][1]
        if first.stride(-1) != 1 or any(
            x.stride() != first.stride()
            or x.dtype != first.dtype
            or x.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            for _, x in side
        ):
            return None
    if keys[0].stride() != values[0].stride():
        return None
    size = min(_page_size(x, length) for side in pairs for length, x in side)
    key_pages, first_pages = _common_pages(pairs[0], size)
    value_pages, value_first_pages = _common_pages(pairs[1], size)
    if first_pages is None or first_pages != value_first_pages:
        return None
    return PagedBuffers(key_pages, value_pages, first_pages)


def _common_pages(
    side: Sequence[tuple[int, Tensor]], size: int
) -> tuple[Tensor, tuple[int, ...] | None]:
    """Pages from the request that lies lowest on, and where each request's begin."""
    lowest = min((x for _, x in side), key=Tensor.storage_offset)
    stride = size * lowest.stride(2)
    away = [x.storage_offset() - lowest.storage_offset() for _, x in side]
    if any(distance % stride for distance in away):
        return lowest, None
    firsts = tuple(distance // stride for distance in away)
    count = max(first + -(-length // size) for first, (length, _) in zip(firsts, side, strict=True))
    shape = (count, lowest.shape[1], size, lowest.shape[3])
    strides = (stride, lowest.stride(1), lowest.stride(2), 1)
    return lowest.as_strided(shape, strides, lowest.storage_offset()), firsts


def _page_size(x: Tensor, length: int) -> int:
    size = PAGE_SIZE
    while size > 1 and not _fits(x, length, size):
        size //= 2
    return size


def _fits(x: Tensor, length: int, size: int) -> bool:
    requests, kv_heads, _, head_dim = x.shape
    page_stride = size * x.stride(2)
    if page_stride == 0 or (requests > 1 and x.stride(0) % page_stride):
        return False
    last = (requests - 1) * x.stride(0) + (-(-length // size) - 1) * page_stride
    end = last + (kv_heads - 1) * x.stride(1) + (size - 1) * x.stride(2) + head_dim
    return x.storage_offset() + end <= x.untyped_storage().nbytes() // x.element_size()


def _pages(x: Tensor, length: int, size: int) -> tuple[Tensor, tuple[int, ...]]:
    requests, kv_heads, _, head_dim = x.shape
    page_stride = size * x.stride(2)
    step = x.stride(0) // page_stride if requests > 1 else 0
    count = (requests - 1) * step + -(-length // size)
    shape = (count, kv_heads, size, head_dim)
    strides = (page_stride, x.stride(1), x.stride(2), 1)
    return x.as_strided(shape, strides), tuple(step * index for index in range(requests))


@dataclasses.dataclass(frozen=True)
class PageTable:
    """Which pages each request of one call reads: int32 arrays on the CPU, as FlashInfer wants.

    Attributes:
        indptr: ``[requests + 1]``: where each request's pages begin in ``indices``.
        indices: Page numbers.
        last_page_len: ``[requests]``: slots in use of each request's last page.
    """

    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor


def page_table(
    tables: Sequence[Tensor], spans: Sequence[tuple[int, int, int]], page_size: int
) -> PageTable:
    """Page table of requests that each read a span of some sequence's slots.

    Args:
        tables: For each sequence, the pages that hold its slots in order, int32 on the CPU.
        spans: ``(sequence, start, stop)`` of each request; ``start`` is a multiple of the page
            size, and ``stop`` is greater.
        page_size: Slots of a page.

    Raises:
        InvalidInputError: A span reaches behind its sequence's pages.
    """
    held = [len(table) for table in tables]
    for sequence, _, stop in spans:
        if -(-stop // page_size) > held[sequence]:
            raise InvalidInputError(
                f"request {sequence} has {stop} slots in use but {held[sequence]} pages of "
                f"{page_size}; give it a page for every slot."
            )
    # All spans at once: one by one, hundreds of them take longer than planning the call.
    sequences, starts, stops = torch.tensor(spans, dtype=torch.long).reshape(-1, 3).unbind(1)
    begins = torch.tensor([0, *itertools.accumulate(held)])[sequences]
    firsts = starts // page_size
    counts = (stops + page_size - 1) // page_size - firsts
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    # Entry e of a span stands for the page at e + the span's shift.
    shifts = (begins + firsts - ends + counts).repeat_interleave(counts, output_size=total)
    return PageTable(
        torch.cat((ends.new_zeros(1), ends)).to(torch.int32),
        torch.cat(list(tables)).to(torch.int32)[torch.arange(total) + shifts],
        ((stops - 1) % page_size + 1).to(torch.int32),
    )
