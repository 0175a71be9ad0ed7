"""A layer of a stitched cache: rows in use, and room behind them to append in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ifkv.backends.plans import UNSCALED, KVScales, tag_stitched
from ifkv.cache.interface import MOVED, RESET, refusing
from ifkv.errors import GeometryError, InvalidInputError
from ifkv.utils.huge_pages import empty

if TYPE_CHECKING:
    from collections.abc import Callable

# Slots kept free behind the context for prompt and answer; capacity is a multiple of a page.
HEADROOM = 256
PAGE = 64


def capacity_for(length: int) -> int:
    """Return the slots to allocate for a context, with headroom, rounded up to pages."""
    return -(-(length + HEADROOM) // PAGE) * PAGE


class StitchedLayer(DynamicLayer):
    """Keys and values of one layer, with room to append in place.

    Attributes:
        keys: ``[1, kv_heads, length, head_dim]``, after the rotation; a view of `key_buffer`.
        values: As keys.
        settle: Called before the buffers' first use if rows are still being loaded; fills them.
        shared: Whether caches of other requests lie in the buffers' allocation.
        kv_dtype: Dtype that rows are rounded to; None if it is the model's.
    """

    kv_dtype: ClassVar[torch.dtype | None] = None

    def __init__(self, key_buffer: Tensor, value_buffer: Tensor, length: int, refusal: str = ""):
        self._key_buffer = key_buffer
        self._value_buffer = value_buffer
        self.settle: Callable[[], None] | None = None
        self.shared = False
        self.length = length
        self.limit: int | None = None
        self._refusal = refusal
        cast(Any, super()).__init__()
        self.dtype, self.device = key_buffer.dtype, key_buffer.device
        self.is_initialized = True

    @property
    def key_buffer(self) -> Tensor:
        """Return the keys with the room behind them, ``[1, kv_heads, capacity, head_dim]``."""
        self._settled()
        return self._key_buffer

    @key_buffer.setter
    def key_buffer(self, buffer: Tensor) -> None:
        self._settled()
        self._key_buffer = buffer

    @property
    def value_buffer(self) -> Tensor:
        """Return the values with the room behind them, shaped as `key_buffer`."""
        self._settled()
        return self._value_buffer

    @value_buffer.setter
    def value_buffer(self, buffer: Tensor) -> None:
        self._settled()
        self._value_buffer = buffer

    def _settled(self) -> None:
        settle = self.settle  # read once: another thread may set it to None meanwhile
        if settle is not None:
            settle()
            self.settle = None

    def __getstate__(self) -> dict[str, Any]:
        self._settled()  # copies and pickles need the rows
        state = self.__dict__.copy()
        if self.shared:  # leave out the rows of other requests
            state["_key_buffer"] = self._key_buffer.clone()
            state["_value_buffer"] = self._value_buffer.clone()
            state["shared"] = False
        return state

    @property
    def keys(self) -> Tensor:
        """Return the keys in use."""
        return self.key_buffer[:, :, : self.length]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        # transformers assigns whole tensors (beams, offloading); its constructor assigns None.
        if keys is not None:
            self.key_buffer, self.length = keys, keys.shape[2]

    @property
    def values(self) -> Tensor:
        """Return the values in use."""
        return self.value_buffer[:, :, : self.length]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        if values is not None:
            self.value_buffer, self.length = values, values.shape[2]

    @property
    def scales(self) -> KVScales:
        """Return the divisors of keys and values: 1, except in an `FP8Layer`."""
        return UNSCALED

    def rows(self, at: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values at slots, in the model's dtype, ``[1, kv_heads, k, head_dim]``."""
        return self.key_buffer[:, :, at], self.value_buffer[:, :, at]

    def get_seq_length(self) -> int:
        """Return the slots in use, without waiting for rows that are being loaded."""
        return self.length

    def reserve(self, length: int) -> None:
        """Make room for ``length`` slots; buffers that have enough are kept.

        Room grows by at least half. So a cache that grows token by token, or turn by turn, is
        copied about twice in all.
        """
        capacity = self._key_buffer.shape[2]  # known before rows are loaded
        if length <= capacity:
            return
        capacity = -(-max(length, capacity + capacity // 2) // PAGE) * PAGE
        for name in ("key_buffer", "value_buffer"):
            old: Tensor = getattr(self, name)
            batch, kv_heads, _, head_dim = old.shape
            new = empty((batch, kv_heads, capacity, head_dim), old.dtype, old.device)
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write rows at slots within the buffers; `length` does not change.

        Args:
            slots: Long ``[rows]``.
            keys: ``[1, kv_heads, rows, head_dim]``.
            values: Of the same shape.
        """
        self.key_buffer.index_copy_(2, slots, keys)
        self.value_buffer.index_copy_(2, slots, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append rows, as transformers asks of a cache layer."""
        if self._refusal:
            raise GeometryError(self._refusal)
        held, given = self._key_buffer.shape, key_states.shape
        if (held[:2], held[3:]) != (given[:2], given[3:]):
            raise InvalidInputError(
                f"rows of shape {tuple(given)} cannot be appended to a cache of {held[0]} "
                f"sequences of {held[1]} heads of {held[3]}. Give model(...) as many sequences as "
                "the cache holds, or have it hold more by cache.batch_repeat_interleave(n)."
            )
        end = self.length + key_states.shape[2]
        if self.limit is not None and end > self.limit:
            raise GeometryError(
                f"the answer reaches position {end - 1}, but longrope changes its frequencies at "
                f"{self.limit}; stop before (max_new_tokens) or use fewer documents."
            )
        self.reserve(end)
        self.key_buffer[:, :, self.length : end] = key_states
        self.value_buffer[:, :, self.length : end] = value_states
        self.length = end
        return tag_stitched(self.keys), self.values

    reset = refusing("reset", RESET)
    offload = refusing("offload", MOVED)
    prefetch = refusing("prefetch", MOVED)

    @property
    def batch_size(self) -> int:
        """Return the number of sequences."""
        return int(self._key_buffer.shape[0])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the layer is initialized and holds rows."""

    def crop(self, tokens_to_remove: int) -> None:
        """Drop rows from the end.

        Args:
            tokens_to_remove: The number of rows, negative as transformers has it.
        """
        self.length -= abs(tokens_to_remove)

    def clone(self) -> StitchedLayer:
        """Return a copy that shares no memory."""
        twin = StitchedLayer(
            self.key_buffer.clone(), self.value_buffer.clone(), self.length, self._refusal
        )
        twin.limit = self.limit
        return twin
