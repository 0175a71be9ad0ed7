"""Documents' keys and values brought into 8 bits: a power of two per layer, and one rounding.

A stitched cache is private to a request, so it may be coarser than the documents it is made from. A
row is divided by its layer's scale and rounded to nearest; since the scale is a power of two, the
division is exact, and rounding is all that is lost:

    |x' - x| <= max(2^-4 |x|, 2^-10 scale)     while |x| <= 448 scale

Being floating point itself, the format gains nothing from a closer scale: a layer's numbers have
to lie within 448 and 2^-6 of it, a factor of 28,000. So one scale does for all heads of a layer,
and can leave room: it is chosen such that the largest number of prefix and documents is at most
half of what fits. Rows that come later (recomputed, prompt, answer) are rounded with the same scale
and, beyond 448 of it, saturate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ifkv.backends.fp8 import FLOAT8, LARGEST, quantize
from ifkv.backends.plans import KVScales
from ifkv.errors import InvalidInputError
from ifkv.models.rope import rotate

# How far rows that come later may exceed the largest of prefix and documents.
ROOM = 2.0


def scale_for(largest: float) -> float:
    """The smallest power of two of which ``448 / 2`` covers the largest magnitude.

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
    """A bound on the magnitudes of a layer's rotated keys, and the magnitude of its values.

    A rotation keeps the length of each pair of dimensions, but for the attention scaling in ``cos``
    and ``sin``. So the bound does not depend on where documents are placed.

    Args:
        rows: Keys before their rotation and values of prefix and documents, each
            ``[..., n, head_dim]``.
        cos: ``[n, rotary_dim]``, of all their slots.
        sin: As cos.

    Returns:
        Two numbers in tensors, on the rows' device.
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
    """Scales of a layer.

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
    """Choose a layer's scales, rotate its keys in the arithmetic of ``cos``, round all of it once.

    Args:
        rows: As in `largest_of`.
        cos: As there.
        sin: As there.
        keys: Where to write, float8 ``[kv_heads, >= n, head_dim]``.
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
