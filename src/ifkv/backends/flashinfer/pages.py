"""Buffers of a cache viewed as pages without a copy, and page tables over them.

FlashInfer reads keys and values through pages: ``[pages, kv_heads, page_size, head_dim]`` with any
strides. A buffer ``[requests, kv_heads, slots, head_dim]`` can be viewed so: a page is a run of
slots, its heads lie one buffer row apart, and the next request begins a whole number of pages
later. Tiles of one request share its pages.

Keys and values need equal strides, because FlashInfer's fa3 kernels, and from 0.7 on all kernels,
take one set of strides for both. Buffers of a cache have them. Tensors that a model has just made
may not, and are copied then.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ifkv.errors import InvalidInputError

# Largest page, in slots: the capacity of a stitched cache is a multiple of it.
PAGE_SIZE = 64


@dataclasses.dataclass(frozen=True)
class PagedBuffers:
    """Keys and values of one layer as pages.

    Attributes:
        keys: ``[pages, kv_heads, page_size, head_dim]``, a view.
        values: Values of the same shape, a view.
        first_pages: Page of each request's slot 0; its other pages follow.
    """

    keys: Tensor
    values: Tensor
    first_pages: tuple[int, ...]

    @property
    def page_size(self) -> int:
        """Return the number of slots of a page."""
        return self.keys.shape[2]


def view_as_pages(keys: Tensor, values: Tensor, length: int) -> PagedBuffers:
    """View the first slots of a buffer as pages.

    The page size is the largest one up to 64 that fits the strides and reads no byte outside the
    storage. A page of one slot always fits.

    Args:
        keys: ``[requests, kv_heads, >= length, head_dim]``, its last dimension contiguous.
        values: Of the same shape.
        length: Slots in use.
    """
    keys, values = _alike(keys, values)
    size = min(_page_size(keys, length), _page_size(values, length))
    key_pages, first_pages = _pages(keys, length, size)
    value_pages, value_first_pages = _pages(values, length, size)
    if first_pages != value_first_pages:  # the distances between requests differ: copy both
        return view_as_pages(_packed(keys), _packed(values), length)
    return PagedBuffers(key_pages, value_pages, first_pages)


def view_as_slots(keys: Tensor, values: Tensor) -> PagedBuffers:
    """View one buffer as pages of one slot, so that a request may begin at any slot.

    Args:
        keys: ``[1, kv_heads, slots, head_dim]``, its last dimension contiguous.
        values: Of the same shape.
    """
    keys, values = _alike(keys, values)
    length = keys.shape[2]
    return PagedBuffers(_pages(keys, length, 1)[0], _pages(values, length, 1)[0], (0,))


def _alike(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with equal strides, except between requests, and a contiguous last dimension."""
    if keys.stride(-1) == 1 and keys.stride()[1:] == values.stride()[1:]:
        return keys, values
    return _packed(keys), _packed(values)


def _packed(x: Tensor) -> Tensor:
    """Return a packed copy; ``contiguous()`` would keep the strides of dimensions of size 1."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def view_together(
    keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int]
) -> PagedBuffers | None:
    """View buffers of several requests in one allocation as pages of one buffer.

    Args:
        keys: Keys of each request, ``[1, kv_heads, >= its length, head_dim]``.
        values: Values of each request, of the same shapes.
        lengths: Slots in use of each request.

    Returns:
        The pages; None if the requests are in different allocations, or not whole pages apart.
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
    """Return pages from the request with the lowest address on, and each request's first page."""
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
    """Page table of one call: int32 arrays on the CPU, in FlashInfer's format.

    Attributes:
        indptr: Start of each request's pages in ``indices``, and the end, ``[requests + 1]``.
        indices: Page numbers of all requests.
        last_page_len: Slots in use of each request's last page, ``[requests]``.
    """

    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor


def page_table(
    tables: Sequence[Tensor], spans: Sequence[tuple[int, int, int]], page_size: int
) -> PageTable:
    """Build the page table of requests that each read a span of a sequence's slots.

    Args:
        tables: Page table of each sequence: its pages in order, int32 on the CPU.
        spans: ``(sequence, start, stop)`` of each request; ``start`` is a multiple of the page
            size, and ``stop`` is greater.
        page_size: Slots of a page.

    Raises:
        InvalidInputError: A span ends behind the pages of its sequence.
    """
    held = [len(table) for table in tables]
    for sequence, _, stop in spans:
        if -(-stop // page_size) > held[sequence]:
            raise InvalidInputError(
                f"request {sequence} has {stop} slots in use but {held[sequence]} pages of "
                f"{page_size}; give it a page for every slot."
            )
    # All spans at once: a loop over hundreds of them would take longer than planning the call.
    sequences, starts, stops = torch.tensor(spans, dtype=torch.long).reshape(-1, 3).unbind(1)
    begins = torch.tensor([0, *itertools.accumulate(held)])[sequences]
    firsts = starts // page_size
    counts = (stops + page_size - 1) // page_size - firsts
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    # Entry e of a span is the page at index e + shift.
    shifts = (begins + firsts - ends + counts).repeat_interleave(counts, output_size=total)
    return PageTable(
        torch.cat((ends.new_zeros(1), ends)).to(torch.int32),
        torch.cat(list(tables)).to(torch.int32)[torch.arange(total) + shifts],
        ((stops - 1) % page_size + 1).to(torch.int32),
    )
