"""A layer of a stitched cache in FP8: one power of two per layer, and one rounding.

A stitched cache is private to a request, so it may be coarser than the documents it is made from. A
row is divided by its layer's scale and rounded to nearest. The scale is a power of two, so the
division is exact, and only the rounding loses anything:

    |x' - x| <= max(2^-4 |x|, 2^-10 scale)     while |x| <= 448 scale

FP8 is floating point itself, so it gains nothing from a closer scale: a layer's numbers have to lie
within 448 and 2^-6 of the scale, a factor of 28,000. One scale therefore serves all heads of a
layer, and can leave room: the largest number of prefix and documents is at most half of what fits.
Rows that come later (recomputed, prompt, answer) are rounded with the same scale and saturate
beyond 448 times the scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ifkv.backends.fp8 import FLOAT8, LARGEST, dequantize, quantize
from ifkv.backends.plans import UNSCALED, KVScales, tag_stitched
from ifkv.cache.layer import StitchedLayer
from ifkv.errors import InvalidInputError
from ifkv.models.rope import rotate

# Later rows may exceed the largest number of prefix and documents by this factor.
ROOM = 2.0
_BUFFERS = ("_key_buffer", "_value_buffer")


class FP8Layer(StitchedLayer):
    """Layer whose keys and values are FP8, divided by the layer's scales.

    Args:
        key_buffer: As in `StitchedLayer`, float8.
        value_buffer: As the keys.
        length: Slots in use.
        wide: The model's dtype.
        refusal: As in `StitchedLayer`.
        scales: Divisors of keys and values.
    """

    kv_dtype = FLOAT8

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
        """Return the divisors of keys and values."""
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
        """Round rows and write them at slots; FP8 rows are copied."""
        for buffer, rows, scale in zip(
            (self.key_buffer, self.value_buffer), (keys, values), self.scales, strict=True
        ):
            # As bytes: torch has no index_copy_ of float8 on a CPU.
            buffer.view(torch.uint8).index_copy_(2, slots, quantize(rows, scale).view(torch.uint8))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Round rows and append them; the returned keys are tagged with the layer's scales."""
        keys, values = super().update(
            quantize(key_states, self.scales.keys), quantize(value_states, self.scales.values)
        )
        return tag_stitched(keys, self.scales), values

    def rows(self, at: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values at some slots, in the model's dtype."""
        return (
            dequantize(self.key_buffer[:, :, at], self.scales.keys, self.dtype),
            dequantize(self.value_buffer[:, :, at], self.scales.values, self.dtype),
        )

    def clone(self) -> FP8Layer:
        """Return a copy that shares no memory."""
        keys, values, scales = self.key_buffer.clone(), self.value_buffer.clone(), self.scales
        twin = FP8Layer(keys, values, self.length, self.dtype, self._refusal, scales)
        twin.limit = self.limit
        return twin


def scale_for(largest: float) -> float:
    """Return the smallest power of two whose ``448 / 2``-fold covers the largest magnitude.

    >>> scale_for(224.0), scale_for(225.0), scale_for(3.0), scale_for(0.0)
    (1.0, 2.0, 0.015625, 1.0)
    """
    if largest == 0:
        return 1.0
    mantissa, exponent = math.frexp(largest * ROOM / LARGEST)
    # Far beyond what 16 bits hold; keeps the scale and its inverse normal numbers.
    return math.ldexp(1.0, min(100, max(-100, exponent - (mantissa == 0.5))))


def largest_of(
    rows: Sequence[tuple[Tensor, Tensor]], cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Bound the magnitude of a layer's rotated keys, and compute that of its values.

    A rotation keeps the length of each pair of dimensions, but for the attention scaling in ``cos``
    and ``sin``. So the bound does not depend on the documents' positions.

    Args:
        rows: Keys before their rotation and values of prefix and documents, each
            ``[..., n, head_dim]``.
        cos: ``[n, rotary_dim]``, of all their slots.
        sin: As cos.

    Returns:
        The bound and the magnitude, each a scalar tensor on the rows' device.
    """
    wide = cos.dtype  # float32, or float64 of a float64 model
    factor = (cos.square() + sin.square()).amax().sqrt()
    half = cos.shape[-1] // 2
    keys, values = [], []
    for k, v in rows:
        if k.shape[-2] == 0:
            continue
        k = k.to(wide)
        pairs = torch.hypot(k[..., :half], k[..., half : 2 * half]).amax() * factor
        others = k[..., 2 * half :]
        keys.append(torch.maximum(pairs, others.abs().amax()) if others.numel() else pairs)
        values.append(v.abs().amax().to(wide))
    return torch.stack(keys).amax(), torch.stack(values).amax()


def scales_of(largest_key: float, largest_value: float) -> KVScales:
    """Return the scales of a layer.

    Raises:
        InvalidInputError: A magnitude is infinite or not a number.
    """
    for name, largest in (("keys", largest_key), ("values", largest_value)):
        if not math.isfinite(largest):
            raise InvalidInputError(
                f"the documents' {name} reach {largest}, which no scale brings into {FLOAT8}. Look "
                "at the documents, or leave kv_dtype out."
            )
    return KVScales(scale_for(largest_key), scale_for(largest_value))


def place_rounded(
    rows: Sequence[tuple[Tensor, Tensor]], cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
) -> KVScales:
    """Choose a layer's scales, rotate its keys in the dtype of ``cos``, and round once.

    Args:
        rows: As in `largest_of`.
        cos: As in `largest_of`.
        sin: As in `largest_of`.
        keys: Output, float8 ``[kv_heads, >= n, head_dim]``.
        values: As the keys.

    Returns:
        The scales.

    Raises:
        InvalidInputError: A number is infinite or not a number.
    """
    found: list[float] = torch.stack(largest_of(rows, cos, sin)).tolist()  # waits for the device
    scales = scales_of(*found)
    slot = 0
    for k, v in rows:
        own = slice(slot, slot + k.shape[-2])
        slot = own.stop
        quantize(rotate(k.to(cos.dtype), cos[own], sin[own]), scales.keys, out=keys[:, own])
        quantize(v, scales.values, out=values[:, own])
    return scales
