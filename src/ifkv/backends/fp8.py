"""The 8-bit floating point that a stitched cache may hold: e4m3, rounded to and widened from.

``torch.float8_e4m3fn`` (2209.05433) has 4 bits of exponent and 3 of mantissa: 448 down to 2^-6 with
an error of at most 1/16, and down to 2^-9 with a larger one.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ifkv.errors import InvalidInputError

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0


def check_kv_dtype(kv_dtype: torch.dtype | None, device: torch.device) -> None:
    """Refuse a dtype that a stitched cache cannot have on this device.

    Raises:
        InvalidInputError: It is neither None nor float8_e4m3fn, or the device cannot convert it.
    """
    if kv_dtype is None:
        return
    if kv_dtype != FLOAT8:
        raise InvalidInputError(
            f"kv_dtype is {kv_dtype}; a stitched cache has the model's dtype (None) or {FLOAT8}."
        )
    reason = _refusal_of_device(torch.device(device.type))
    if reason:
        raise InvalidInputError(
            f"kv_dtype is {FLOAT8}, which {device.type} cannot convert ({reason}). Leave kv_dtype "
            "out."
        )


@functools.cache
def _refusal_of_device(device: torch.device) -> str:
    """What goes wrong when this device rounds to 8 bits and back; empty if nothing does."""
    try:
        found = torch.tensor([1.0, 300.0], device=device).to(FLOAT8).float().tolist()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # each device its own
        return str(error).splitlines()[0]
    return "" if found == [1.0, 288.0] else f"1 and 300 became {found}"


def quantize(x: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Divide by the scale and round to 8 bits, saturating; rows of 8 bits are taken as they are.

    Args:
        x: Any floating dtype.
        scale: A power of two.
        out: Where to write, of x's shape; made if None.
    """
    if x.dtype != FLOAT8:
        wide = torch.promote_types(x.dtype, torch.float32)
        # What lies beyond the range becomes NaN in some releases of torch.
        x = x.to(wide).mul(1 / scale).clamp_(-LARGEST, LARGEST).to(FLOAT8)
    return x if out is None else out.copy_(x)


def upcast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in a wider dtype; those of 8 bits are not yet multiplied by their scale."""
    if x.dtype != FLOAT8 or x.device.type != "cpu":
        return x.to(dtype)
    # torch converts one number at a time on a CPU. Shifted into place, the bits are a float16 of
    # 1/256 the size; only NaN, all ones, becomes 480.
    bits = x.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    wide = bits.view(torch.float16).to(torch.promote_types(dtype, torch.float32)).mul_(256)
    return wide.masked_fill_(wide.abs() > LARGEST, math.nan).to(dtype)


def dequantize(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """What 8-bit numbers stand for, in a wider dtype."""
    return upcast(x, dtype).mul_(scale)
