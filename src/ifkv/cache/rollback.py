"""Rollback of a cache when something fails: a turn of a conversation happens or does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ifkv.cache.layer import StitchedLayer
    from ifkv.cache.stitched import StitchedCache


@contextmanager
def all_or_nothing(cache: StitchedCache) -> Iterator[Callable[[Tensor], None]]:
    """Roll the cache back to its state before the block if the block raises.

    Rows that the block appends are dropped. The cache is not copied.

    Args:
        cache: A request's cache, which nobody else is using.

    Yields:
        A function that saves the rows at slots of the context, long ``[k]``. Call it before they
        are overwritten.
    """
    before, lengths = dict(cache.__dict__), [layer.length for layer in cache.layers]
    saved: list[tuple[StitchedLayer, Tensor, Tensor, Tensor]] = []

    def save(slots: Tensor) -> None:
        at = slots.to(cache.token_ids.device)
        for layer in cache.layers if len(at) else ():
            saved.append((layer, at, layer.key_buffer[:, :, at], layer.value_buffer[:, :, at]))

    try:
        yield save
    except BaseException:
        cache.__dict__.update(before)
        for layer, length in zip(cache.layers, lengths, strict=True):
            layer.length = length
        for layer, at, keys, values in reversed(saved):
            layer.write(at, keys, values)
        raise
