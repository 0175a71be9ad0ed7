"""A layer of a stitched cache that keeps its rows in 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ifkv.backends.fp8 import FLOAT8, dequantize, quantize
from ifkv.backends.plans import UNSCALED, KVScales, tag_stitched
from ifkv.cache.layer import StitchedLayer

_BUFFERS = ("_key_buffer", "_value_buffer")


class RoundedLayer(StitchedLayer):
    """Keys and values as float8, divided by the layer's scales; rows are rounded as they come.

    Args:
        key_buffer: As of `StitchedLayer`, float8.
        value_buffer: As the keys.
        length: Slots in use.
        wide: The model's dtype.
        refusal: As of `StitchedLayer`.
        scales: What keys and values have been divided by.
    """

    def __init__(
        self,
        key_buffer: Tensor,
        value_buffer: Tensor,
        length: int,
        wide: torch.dtype,
        refusal: str = "",
        scales: KVScales = UNSCALED,
    ):
        super().__init__(key_buffer, value_buffer, length, refusal)
        self.dtype = wide  # of the rows that transformers appends
        self._scales = scales

    @property
    def scales(self) -> KVScales:
        """What keys and values have been divided by."""
        self._settled()
        return self._scales

    @scales.setter
    def scales(self, scales: KVScales) -> None:
        self._scales = scales

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in _BUFFERS:  # as bytes: pickle brings no float8 back
            state[name] = state[name].view(torch.uint8)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in _BUFFERS:
            self.__dict__[name] = state[name].view(FLOAT8)

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Round rows and write them at slots; rows of 8 bits are written as they are."""
        for buffer, rows, scale in zip(
            (self.key_buffer, self.value_buffer), (keys, values), self.scales, strict=True
        ):
            # As bytes: torch has no index_copy_ of float8 on a CPU.
            buffer.view(torch.uint8).index_copy_(2, slots, quantize(rows, scale).view(torch.uint8))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Round rows and append them; what is returned says by which scales to read it."""
        keys, values = super().update(
            quantize(key_states, self.scales.keys), quantize(value_states, self.scales.values)
        )
        return tag_stitched(keys, self.scales), values

    def rows(self, at: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at some slots, in the model's dtype."""
        return (
            dequantize(self.key_buffer[:, :, at], self.scales.keys, self.dtype),
            dequantize(self.value_buffer[:, :, at], self.scales.values, self.dtype),
        )

    def clone(self) -> RoundedLayer:
        """A layer of its own with the same contents."""
        keys, values, scales = self.key_buffer.clone(), self.value_buffer.clone(), self.scales
        twin = RoundedLayer(keys, values, self.length, self.dtype, self._refusal, scales)
        twin.limit = self.limit
        return twin
