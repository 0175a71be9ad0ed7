"""FP8 (e4m3) rows of a stitched cache: quantize and dequantize.

``torch.float8_e4m3fn`` (2209.05433) has 4 bits of exponent and 3 of mantissa. From 448 down to 2^-6
the relative error is at most 1/16; down to 2^-9 it is larger.
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
    """Raise if a stitched cache cannot have this dtype on this device.

    Raises:
        InvalidInputError: The dtype is neither None nor float8_e4m3fn, or the device cannot convert
            it.
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
    """Return why this device cannot convert to FP8 and back; empty if it can."""
    try:
        found = torch.tensor([1.0, 300.0], device=device).to(FLOAT8).float().tolist()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # differs by device
        return str(error).splitlines()[0]
    return "" if found == [1.0, 288.0] else f"1 and 300 became {found}"


def quantize(x: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Divide by a scale and round to FP8, saturating; FP8 input is returned unchanged.

    Args:
        x: Tensor of any floating-point dtype.
        scale: A power of two.
        out: Tensor to write to, of x's shape; allocated if None.

    Returns:
        ``x / scale`` in FP8.
    """
    if x.dtype != FLOAT8:
        wide = torch.promote_types(x.dtype, torch.float32)
        # In some releases of torch, values beyond the range become NaN.
        x = x.to(wide).mul(1 / scale).clamp_(-LARGEST, LARGEST).to(FLOAT8)
    return x if out is None else out.copy_(x)


def upcast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to a wider dtype; FP8 numbers are not multiplied by their scale."""
    if x.dtype != FLOAT8 or x.device.type != "cpu":
        return x.to(dtype)
    # On a CPU torch converts one number at a time. The shifted bits are a float16 of 1/256 the
    # value. Only NaN, which is all ones, becomes 480.
    bits = x.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    wide = bits.view(torch.float16).to(torch.promote_types(dtype, torch.float32)).mul_(256)
    return wide.masked_fill_(wide.abs() > LARGEST, math.nan).to(dtype)


def dequantize(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Convert FP8 numbers to a wider dtype and multiply them by their scale."""
    return upcast(x, dtype).mul_(scale)
