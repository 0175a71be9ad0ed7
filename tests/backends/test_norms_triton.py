"""The Triton kernel of attention norms against the blocked torch form.

Runs where Triton is: on the CPU through its interpreter (`tox -e triton`), or on a GPU under
`pytest -m gpu`. Triton is 150 MB, hence not among the dependencies of the tests.
"""

import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from ifkv.backends.base import QueryPlan
from ifkv.backends.norms import blocked_attention_norm
from ifkv.backends.spec import AttentionSpec
from ifkv.testing import assert_close

pytest.importorskip("triton", reason="Triton is tested in an environment of its own: tox -e triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def check(rows, length, heads, head_dim, window, reduction, device, dtype, gap=0, weigh=False):
    from ifkv.backends.norms_triton import triton_attention_norm

    generator = torch.Generator().manual_seed(rows * 1000 + length)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    # Strides as the library has them: rows before heads, and a slice of a longer buffer.
    query = random(1, rows, heads[0], head_dim).transpose(1, 2)
    keys = random(1, heads[1], length + 64, head_dim)[:, :, :length]
    logits = query[0].float() @ keys[0].repeat_interleave(heads[0] // heads[1], 0).float().mT * 0.3
    lse = torch.logsumexp(logits, -1)[None] + 0.1  # as if the query's own tokens had a share
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    plan = QueryPlan(
        torch.arange(length + gap, length + gap + rows, device=device),
        torch.arange(length, device=device),
        None,
    )
    spec = AttentionSpec(0.3, window)
    # Not strided as the keys are.
    values = random(1, heads[1], length, head_dim) if weigh else None
    got = triton_attention_norm(query, keys, lse, plan, spec, reduction=reduction, values=values)
    wide = values.float() if weigh else None
    want = blocked_attention_norm(
        query.float(), keys.float(), lse, plan, spec, reduction=reduction, values=wide
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    assert_close(got, want, what=f"{reduction} norm", tolerance=tolerance)


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 is not set, and no GPU is used")
@given(
    rows=st.integers(1, 80),
    length=st.integers(1, 140),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 3), (8, 1)]),
    head_dim=st.sampled_from([8, 24, 64]),
    window=st.sampled_from([None, None, 5, 60]),
    reduction=st.sampled_from(["l2", "sum"]),
    gap=st.integers(0, 9),
    weigh=st.booleans(),
)
@settings(max_examples=25)
def test_the_interpreted_kernel_equals_the_blocked_form(
    rows, length, heads, head_dim, window, reduction, gap, weigh
):
    check(rows, length, heads, head_dim, window, reduction, "cpu", torch.float32, gap, weigh)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 500])
@pytest.mark.parametrize("reduction", ["l2", "sum"])
def test_the_compiled_kernel_equals_the_blocked_form(dtype, head_dim, window, reduction):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for rows, length in ((1, 1), (37, 4099), (130, 1000)):
        for weigh in (False, True):
            check(rows, length, (8, 2), head_dim, window, reduction, "cuda", dtype, weigh=weigh)
