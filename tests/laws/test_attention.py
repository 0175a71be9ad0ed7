"""Query attention, attention norms and their building blocks, against dense masks."""

import dataclasses
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dense_attention import Heads, dense_attention, heads, often, visible_rows
from ifkv.backends import norms, partial
from ifkv.backends.partial import attend_partial, merge_partial
from ifkv.backends.reference import ReferenceBackend
from ifkv.backends.spec import AttentionSpec
from ifkv.testing import assert_bit_equal, assert_close

DTYPES = [torch.float64, torch.float32]
windows = st.none() | st.integers(1, 40)
lengths = st.integers(1, 30)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 1e-5


def random_mask(rows: int, keys: int, share: float, seed: int) -> torch.Tensor:
    """True where a row must not look; some rows see nothing at all."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, keys, generator=generator) < share
    mask[torch.rand(rows, generator=generator) < 0.2] = True
    return mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@often
@given(
    shape=heads(),
    queries=st.integers(1, 8),
    context=st.integers(1, 30),
    window=windows,
    block=st.integers(1, 12),
    data=st.data(),
)
def test_query_attention_and_norms_equal_a_dense_mask(
    dtype: torch.dtype,
    shape: Heads,
    queries: int,
    context: int,
    window: int | None,
    block: int,
    data: st.DataObject,
) -> None:
    """At any context positions, overlapping ones too; windows count positions, not slots."""
    places = st.lists(st.integers(0, 40), min_size=context, max_size=context)
    context_positions = torch.tensor(data.draw(places, label="context positions"))
    query_positions = torch.arange(41, 41 + queries)
    query, keys, values = shape.draw(queries, context + queries, dtype)
    context_keys, own_keys = keys[:, :, :context], keys[:, :, context:]
    backend = ReferenceBackend()
    plan = backend.plan_queries([query_positions], [context_positions])
    spec = AttentionSpec(0.4, window)
    out, logsumexp = backend.attend_queries(
        query,
        own_keys,
        values[:, :, context:],
        [context_keys],
        [values[:, :, :context]],
        plan,
        spec,
    )
    positions = torch.cat([context_positions, query_positions])
    visible = visible_rows(query_positions, positions, window)
    want_out, want_logsumexp, attention = dense_attention(query, keys, values, visible, 0.4)
    assert_close(out, want_out, what="output", tolerance=tolerance(dtype))
    assert_close(logsumexp, want_logsumexp, what="log-sum-exp", tolerance=tolerance(dtype))

    mean = attention[0, :, :, :context].mean(0)
    context_values = values[:, :, :context]
    sizes = context_values[0].abs().sum(dim=-1).mean(dim=0)
    for reduction, expected in (("l2", mean.norm(dim=0)), ("sum", mean.sum(dim=0))):
        for weights, weighed in ((None, expected), (context_values, expected * sizes)):
            with patch.object(norms, "NORM_BLOCK", block):
                got = backend.attention_norm(
                    query,
                    context_keys,
                    logsumexp,
                    plan.parts[0],
                    spec,
                    reduction=reduction,
                    values=weights,
                )
            assert_close(got, weighed, what=f"{reduction} norms", tolerance=tolerance(dtype))


def test_norms_of_no_context_are_none() -> None:
    query, keys, _ = Heads(1, 2, 4, 0).draw(2, 0, torch.float64)
    backend = ReferenceBackend()
    plan = backend.plan_queries([torch.arange(2)], [torch.arange(0)]).parts[0]
    got = backend.attention_norm(
        query, keys, torch.zeros(1, 2, 2).double(), plan, AttentionSpec(1.0), reduction="l2"
    )
    assert got.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@often
@given(
    shape=heads(),
    rows=lengths,
    keys=lengths,
    share=st.sampled_from([0.0, 0.3, 0.9]),
    elements=st.integers(1, 200),
)
def test_masked_attention_on_both_paths_equals_the_definition(
    dtype: torch.dtype, shape: Heads, rows: int, keys: int, share: float, elements: int
) -> None:
    """The CPU's flash kernel and the explicit form, whatever its blocks; blind rows included."""
    query, k, v = shape.draw(rows, keys, dtype)
    mask = random_mask(rows, keys, share, shape.seed)
    want, want_logsumexp, _ = dense_attention(query, k, v, ~mask, 0.4)
    blind = mask.all(dim=1)
    with patch.object(partial, "_EXPLICIT_ELEMENTS", elements):
        explicit = partial._attend_explicit(query, k, v, AttentionSpec(0.4), mask)
    for name, (out, logsumexp) in (
        ("kernel", attend_partial(query, k, v, AttentionSpec(0.4), mask=mask)),
        ("explicit", explicit),
    ):
        assert out.dtype == logsumexp.dtype == dtype
        assert_close(out.transpose(1, 2), want, what=f"output, {name}", tolerance=tolerance(dtype))
        assert (logsumexp[:, :, blind] == float("-inf")).all()
        assert not out[:, :, blind].any()
        assert_close(
            logsumexp[:, :, ~blind],
            want_logsumexp[:, :, ~blind],
            what=f"log-sum-exp, {name}",
            tolerance=tolerance(dtype),
        )


@often
@given(shape=heads(), rows=lengths, keys=lengths, causal=st.booleans())
def test_unmasked_and_causal_attention_on_both_paths(
    shape: Heads, rows: int, keys: int, causal: bool
) -> None:
    keys = rows if causal else keys
    query, k, v = shape.draw(rows, keys, torch.float64)
    visible = torch.ones(rows, keys).bool()
    visible = visible.tril() if causal else visible
    want, want_logsumexp, _ = dense_attention(query, k, v, visible, 0.4)
    kernel = attend_partial(query, k, v, AttentionSpec(0.4), causal=causal)
    explicit = partial._attend_explicit(query, k, v, AttentionSpec(0.4), ~visible)
    for out, logsumexp in (kernel, explicit):
        assert_close(out.transpose(1, 2), want, what="output", tolerance=1e-12)
        assert_close(logsumexp, want_logsumexp, what="log-sum-exp", tolerance=1e-12)


@often
@given(shape=heads(), rows=lengths, keys=lengths, share=st.sampled_from([0.0, 0.5]))
def test_half_precision_on_both_paths(shape: Heads, rows: int, keys: int, share: float) -> None:
    """Log-sum-exps stay float32; outputs are rounded to bfloat16."""
    query, k, v = shape.draw(rows, keys, torch.bfloat16)
    mask = random_mask(rows, keys, share, shape.seed)
    want, want_logsumexp, _ = dense_attention(query, k, v, ~mask, 0.4)
    seeing = ~mask.all(dim=1)
    for out, logsumexp in (
        attend_partial(query, k, v, AttentionSpec(0.4), mask=mask),
        partial._attend_explicit(query, k, v, AttentionSpec(0.4), mask),
    ):
        assert (out.dtype, logsumexp.dtype) == (torch.bfloat16, torch.float32)
        assert_close(out.transpose(1, 2), want, what="output", tolerance=3 * 2**-8)
        got, expected = logsumexp[:, :, seeing], want_logsumexp[:, :, seeing]
        assert_close(got, expected, what="log-sum-exp", tolerance=1e-3)


@often
@given(shape=heads(), rows=lengths, keys=lengths, data=st.data())
def test_merged_parts_equal_the_whole(
    shape: Heads, rows: int, keys: int, data: st.DataObject
) -> None:
    """However the keys are cut into three, empty parts included, and in either order."""
    cuts = sorted(data.draw(st.tuples(st.integers(0, keys), st.integers(0, keys)), label="cuts"))
    query, k, v = shape.draw(rows, keys, torch.float64)
    visible = ~random_mask(rows, keys, 0.4, shape.seed)
    parts = [
        attend_partial(query, k[:, :, a:b], v[:, :, a:b], AttentionSpec(0.4), mask=~visible[:, a:b])
        for a, b in ((0, cuts[0]), (cuts[0], cuts[1]), (cuts[1], keys))
    ]
    whole = attend_partial(query, k, v, AttentionSpec(0.4))
    seeing = visible.any(dim=1)
    want, want_logsumexp, _ = dense_attention(query, k, v, visible, 0.4)
    for order in (parts, parts[::-1]):
        out, logsumexp = order[0]
        for part in order[1:]:
            out, logsumexp = merge_partial(out, logsumexp, *part)
            # Nothing is promised of the output of a row that has seen no key in either part.
            out = out.masked_fill(logsumexp.isneginf()[..., None], 0.0)
        got = out.transpose(1, 2)[:, seeing]
        assert_close(got, want[:, seeing], what="merged output", tolerance=1e-12)
        got, expected = logsumexp[:, :, seeing], want_logsumexp[:, :, seeing]
        assert_close(got, expected, what="merged log-sum-exp", tolerance=1e-12)
    nothing = torch.full_like(whole[1], float("-inf"))
    out, logsumexp = merge_partial(torch.zeros_like(whole[0]), nothing, *whole)
    assert_bit_equal(out, whole[0], what="merged with nothing")
    assert_bit_equal(logsumexp, whole[1], what="log-sum-exp merged with nothing")


@often
@given(
    shape=heads(),
    prefix=st.integers(0, 6),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 40),
)
def test_documents_see_prefix_and_themselves(
    shape: Heads, prefix: int, lengths: list[int], window: int | None
) -> None:
    """With a prefix much shorter than its document, as short, longer, and none at all."""
    backend, scaling = ReferenceBackend(), shape.head_dim**-0.5
    query, keys, values = shape.draw(sum(lengths), sum(lengths), torch.float64)
    _, prefix_keys, prefix_values = dataclasses.replace(shape, seed=shape.seed + 1).draw(
        1, prefix, torch.float64
    )
    plan = backend.plan_documents(tuple(lengths), prefix, torch.device("cpu"))
    out = backend.attend_documents(
        query,
        keys,
        values,
        prefix_keys,
        prefix_values,
        plan,
        AttentionSpec(scaling, window),
    )
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        start += length
        positions = torch.arange(prefix, prefix + length)
        visible = visible_rows(positions, torch.arange(prefix + length), window)
        expected, _, _ = dense_attention(
            query[:, :, rows],
            torch.cat((prefix_keys, keys[:, :, rows]), dim=2),
            torch.cat((prefix_values, values[:, :, rows]), dim=2),
            visible,
            scaling,
        )
        assert_close(out[:, rows], expected, what="attention", tolerance=1e-10)
