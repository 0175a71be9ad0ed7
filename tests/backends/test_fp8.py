"""The 8-bit format: rounding, widening and scales."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ifkv.backends.fp8 import FLOAT8, LARGEST, dequantize, quantize, upcast
from ifkv.cache import fp8_layer
from ifkv.testing import assert_bit_equal
from rounded_by_hand import on_grid


def numbers(rows: int = 4096) -> torch.Tensor:
    """From far below the format's range to far above it, of both signs."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp2(torch.empty(rows).uniform_(-14, 12, generator=generator))
    return sizes * torch.randn(rows, generator=generator).sign()


def test_rounding_is_to_nearest_with_a_relative_error_of_a_sixteenth_and_saturates():
    x = numbers()
    for scale in (1.0, 0.25, 8.0):
        got = dequantize(quantize(x, scale), scale, torch.float32)
        assert_bit_equal(got, on_grid(x, scale), what="rounded", axes=("n",))
        inside = x.abs() <= LARGEST * scale
        bound = torch.maximum(x.abs() / 16, torch.tensor(scale * 2.0**-10))
        assert bool(((got - x).abs() <= bound)[inside].all())
        assert bool((got.abs() == LARGEST * scale)[~inside].all())
        assert 0 < int(inside.sum()) < len(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_all_256_numbers_are_widened_as_torch_does_and_rounded_back(dtype):
    every = torch.arange(256, dtype=torch.uint8).view(FLOAT8)
    wide = upcast(every, dtype)
    assert wide.dtype == dtype
    torch.testing.assert_close(wide, every.to(dtype), rtol=0, atol=0, equal_nan=True)
    back = quantize(wide, 1.0).float()
    torch.testing.assert_close(back, every.float(), rtol=0, atol=0, equal_nan=True)


def test_what_is_not_a_number_stays_so():
    bad = torch.tensor([math.nan, 1.0, math.inf])
    got = dequantize(quantize(bad, 2.0), 2.0, torch.float32)
    assert got[0].isnan()
    assert got[1:].tolist() == [1.0, 2 * LARGEST]


@given(st.floats(min_value=1e-20, max_value=1e20))
def test_a_scale_is_the_smallest_power_of_two_that_leaves_room(largest):
    scale = fp8_layer.scale_for(largest)
    assert math.frexp(scale)[0] == 0.5
    assert scale / 2 * LARGEST < largest * fp8_layer.ROOM <= scale * LARGEST
