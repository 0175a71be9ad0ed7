"""Softcap and sinks in every operation of the reference backend, against dense attention.

The softcaps are small enough to bite: logits are several units wide.
"""

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dense_attention import Heads, dense_attention, heads, often, scattered_slots, visible_rows
from ifkv.backends import norms, partial, quantized, tiles
from ifkv.backends.partial import add_sinks, attend_partial
from ifkv.backends.plans import KVScales
from ifkv.backends.reference import ReferenceBackend
from ifkv.backends.spec import AttentionSpec
from ifkv.testing import assert_bit_equal, assert_close

CPU = torch.device("cpu")
SCALING = 0.7
windows = st.none() | st.integers(1, 40)


@dataclass(frozen=True)
class Extras:
    """What a layer asks for beside scaling and window."""

    softcap: float | None
    sinks: bool

    def of(self, shape: Heads) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(shape.seed + 7)
        drawn = 2 * torch.randn(
            shape.kv_heads * shape.group, generator=generator, dtype=torch.float64
        )
        return {"softcap": self.softcap, "sinks": drawn if self.sinks else None}


extras = st.builds(Extras, softcap=st.sampled_from([None, 0.3, 2.0]), sinks=st.booleans())


@often
@given(
    shape=heads(),
    prefix=st.integers(0, 6),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    window=windows,
    asked=extras,
)
def test_documents(
    shape: Heads, prefix: int, lengths: list[int], window: int | None, asked: Extras
) -> None:
    backend, extra = ReferenceBackend(), asked.of(shape)
    query, keys, values = shape.draw(sum(lengths), prefix + sum(lengths), torch.float64)
    out = backend.attend_documents(
        query,
        keys[:, :, prefix:],
        values[:, :, prefix:],
        keys[:, :, :prefix],
        values[:, :, :prefix],
        backend.plan_documents(tuple(lengths), prefix, CPU),
        AttentionSpec(SCALING, window, **extra),
    )
    owner = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)])
    local = torch.tensor([prefix + j for length in lengths for j in range(length)])
    visible = visible_rows(local, torch.cat([torch.arange(prefix), local]), window)
    visible[:, prefix:] &= owner[:, None] == owner[None, :]
    expected, _, _ = dense_attention(query, keys, values, visible, SCALING, **extra)
    assert_close(out, expected, what="attention", tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@often
@given(
    slots=scattered_slots(),
    more=scattered_slots(),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 30), st.integers(1, 9)),
    shape=heads(),
    window=windows,
    asked=extras,
)
def test_scattered_rows_of_two_requests(
    dtype: torch.dtype,
    slots: list[int],
    more: list[int],
    sizes: tuple[int, int, int],
    shape: Heads,
    window: int | None,
    asked: Extras,
) -> None:
    backend, extra = ReferenceBackend(), asked.of(shape)
    parts = [torch.tensor(slots), torch.tensor(more)]
    drawn = [
        replace(shape, seed=shape.seed + i).draw(len(own), int(own[-1]) + 1, dtype)
        for i, own in enumerate(parts)
    ]
    rows, span, run = sizes
    with (
        patch.object(tiles, "TILE_ROWS", rows),
        patch.object(tiles, "TILE_SPAN", span),
        patch.object(tiles, "RUN_ROWS", run),
    ):
        plan = backend.plan_requests(parts, [int(own[-1]) + 1 for own in parts], CPU)
        got = backend.attend_requests(
            torch.cat([query for query, _, _ in drawn], dim=2),
            [keys for _, keys, _ in drawn],
            [values for _, _, values in drawn],
            plan,
            AttentionSpec(SCALING, window, **extra),
        )
    expected = torch.cat(
        [
            dense_attention(
                query,
                keys,
                values,
                visible_rows(own, torch.arange(keys.shape[2]), window),
                SCALING,
                **extra,
            )[0]
            for own, (query, keys, values) in zip(parts, drawn, strict=True)
        ],
        dim=1,
    )
    assert got.dtype == dtype
    # 8 bits: probabilities, both parts, the merged output and the sink's factor are rounded.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5 * 2**-8}[dtype]
    assert_close(got, expected, what="rows", tolerance=tolerance)


@often
@given(
    shape=heads(),
    queries=st.integers(1, 8),
    context=st.integers(1, 30),
    window=windows,
    block=st.integers(1, 12),
    asked=extras,
)
def test_queries_and_norms(
    shape: Heads, queries: int, context: int, window: int | None, block: int, asked: Extras
) -> None:
    """The log-sum-exp counts the sinks, so scores are those of the whole softmax."""
    backend, extra = ReferenceBackend(), asked.of(shape)
    query, keys, values = shape.draw(queries, context + queries, torch.float64)
    positions = torch.arange(context + queries)
    asking = positions[context:]
    plan = backend.plan_queries([asking], [positions[:context]])
    spec = AttentionSpec(SCALING, window, **extra)
    out, logsumexp = backend.attend_queries(
        query,
        keys[:, :, context:],
        values[:, :, context:],
        [keys[:, :, :context]],
        [values[:, :, :context]],
        plan,
        spec,
    )
    visible = visible_rows(asking, positions, window)
    want, want_logsumexp, attention = dense_attention(
        query, keys, values, visible, SCALING, **extra
    )
    assert_close(out, want, what="output", tolerance=1e-12)
    assert_close(logsumexp, want_logsumexp, what="log-sum-exp", tolerance=1e-12)
    mean = attention[0, :, :, :context].mean(0)
    size = values[0, :, :context].abs().sum(dim=-1).mean(dim=0)
    for reduction, expected in (("l2", mean.norm(dim=0)), ("sum", mean.sum(dim=0))):
        for weights, weighed in ((None, expected), (values[:, :, :context], expected * size)):
            arguments: Any = dict(reduction=reduction, values=weights)
            with patch.object(norms, "NORM_BLOCK", block):
                got = backend.attention_norm(
                    query, keys[:, :, :context], logsumexp, plan.parts[0], spec, **arguments
                )
            assert_close(got, weighed, what=f"{reduction} norms", tolerance=1e-12)


def eighths(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of 8 bits, and the numbers they stand for at a scale of 2."""
    small = (x / 2).to(torch.float8_e4m3fn)
    return small, small.double() * 2


@often
@given(
    shape=heads(), rows=st.integers(1, 6), count=st.integers(6, 30), asked=extras, data=st.data()
)
def test_rows_of_eight_bits(
    shape: Heads, rows: int, count: int, asked: Extras, data: st.DataObject
) -> None:
    """Scattered rows, queries and decoding: the softcap is of the logits after the scale."""
    backend, extra, scales = ReferenceBackend(), asked.of(shape), KVScales(2.0, 2.0)
    query, keys, values = shape.draw(rows, count, torch.float32)
    (keys, wide_keys), (values, wide_values) = eighths(keys), eighths(values)
    spec = AttentionSpec(SCALING, **extra)
    slots = torch.tensor(sorted(data.draw(st.permutations(range(count)), label="slots")[:rows]))
    with patch.object(quantized, "BLOCK_SLOTS", data.draw(st.integers(1, 9), label="block")):
        got = backend.attend_requests(
            query,
            [keys],
            [values],
            backend.plan_requests([slots], [count], CPU),
            spec,
            scales=[scales],
        )
        one = query[:, :, :1]
        decoded = backend.decode(one, keys, values, spec, scales=scales)
    visible = visible_rows(slots, torch.arange(count), None)
    expected, _, _ = dense_attention(query, wide_keys, wide_values, visible, SCALING, **extra)
    assert_close(got, expected, what="rows", tolerance=1e-5)
    everything = torch.ones(1, count, dtype=torch.bool)
    expected, _, _ = dense_attention(one, wide_keys, wide_values, everything, SCALING, **extra)
    assert decoded is not None
    assert_close(decoded, expected, what="decoding", tolerance=1e-5)


@often
@given(shape=heads(), rows=st.integers(1, 20), elements=st.integers(1, 200), causal=st.booleans())
def test_a_softcap_takes_the_explicit_form_whatever_its_blocks(
    shape: Heads, rows: int, elements: int, causal: bool
) -> None:
    query, keys, values = shape.draw(rows, rows, torch.float64)
    visible = torch.ones(rows, rows).bool()
    visible = visible.tril() if causal else visible
    want, want_logsumexp, _ = dense_attention(query, keys, values, visible, 0.4, softcap=0.5)
    with patch.object(partial, "_EXPLICIT_ELEMENTS", elements):
        out, logsumexp = attend_partial(
            query, keys, values, AttentionSpec(0.4, softcap=0.5), causal=causal
        )
    assert_close(out.transpose(1, 2), want, what="output", tolerance=1e-12)
    assert_close(logsumexp, want_logsumexp, what="log-sum-exp", tolerance=1e-12)


def test_a_row_that_sees_nothing_gives_all_its_attention_to_the_sink() -> None:
    spec = AttentionSpec(1.0, sinks=torch.tensor([3.0, -2.0]))
    out, logsumexp = torch.zeros(1, 2, 1, 4), torch.full((1, 2, 1), float("-inf"))
    seen, total = add_sinks(out, logsumexp, spec)
    assert not seen.any()
    assert total[0, :, 0].tolist() == [3.0, -2.0]
    same = add_sinks(out, logsumexp, AttentionSpec(1.0))
    assert_bit_equal(same[0], out, what="output without sinks")
