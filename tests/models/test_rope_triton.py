"""The Triton kernel that places rotated keys, against the rotation itself: to the bit.

Runs where Triton is, as `test_norms_triton.py` does.
"""

import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from ifkv.models.rope import rotate
from ifkv.testing import assert_bit_equal

pytest.importorskip("triton", reason="Triton is tested in an environment of its own: tox -e triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def check(rows, shape, rotary_dim, slot, device, dtype):
    from ifkv.models.rope_triton import place_rotated

    layers, heads, head_dim = shape
    generator = torch.Generator().manual_seed(rows)

    def random(*sizes):
        return torch.randn(*sizes, generator=generator).to(dtype).to(device)

    keys, values = random(layers, heads, rows, head_dim), random(layers, rows, heads, head_dim)
    values = values.transpose(1, 2)  # as a projection leaves them: other strides than the keys'
    cos, sin = (random(rows, rotary_dim // 2).repeat(1, 2) for _ in range(2))
    # One request's part of a longer buffer.
    want, got = (random(2, layers, heads, slot + rows + 70, head_dim) for _ in range(2))
    got.copy_(want)
    own = slice(slot, slot + rows)
    rotate(keys, cos, sin, out=want[0][:, :, own])
    want[1][:, :, own] = values
    place_rotated(keys, values, cos, sin, got[0], got[1], slot)
    assert_bit_equal(got[0], want[0], what="keys")
    assert_bit_equal(got[1], want[1], what="values")


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 is not set, and no GPU is used")
@given(
    rows=st.integers(0, 140),
    shape=st.sampled_from([(1, 1, 8), (3, 2, 24), (2, 3, 64)]),
    partial=st.booleans(),
    slot=st.integers(0, 70),
)
@settings(max_examples=25)
def test_the_interpreted_kernel_equals_the_rotation(rows, shape, partial, slot):
    rotary_dim = shape[2] // 2 if partial else shape[2]
    # Not in bfloat16, which the interpreter cuts off where a GPU rounds.
    check(rows, shape, rotary_dim, slot, "cpu", torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 128), (96, 48), (256, 256)])
def test_the_compiled_kernel_equals_the_rotation(dtype, head_dim, rotary_dim):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for rows, slot in ((1, 0), (37, 5), (500, 1000)):
        check(rows, (3, 4, head_dim), rotary_dim, slot, "cuda", dtype)
