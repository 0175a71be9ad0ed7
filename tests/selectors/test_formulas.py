"""What each selector computes, against the formula written out densely."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ifkv
from ifkv import selectors
from ifkv.selectors import cacheblend as cacheblend_module
from ifkv.testing import (
    assert_close,
    dense_prefill,
    dense_recompute,
    dense_rows,
    dense_scores,
    dense_stitched,
    shared_tiny_model,
)
from scenario import Scenario, keys_of, prepared, scenarios, values_of
from selecting import ROUNDED, TOKENS, asked, chosen


@pytest.mark.parametrize("deviation", ["k", "v", "kv"])
@given(s=scenarios(min_documents=2), block=st.integers(1, 9))
def test_cacheblend_deviates_as_a_dense_computation_says(
    deviation: str, s: Scenario, block: int
) -> None:
    """The second layer's keys and values of a full prefill (law 7), against the stitched ones."""
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        rule: Any = selectors.resolve(f"cacheblend:deviation={deviation}")
        with patch.object(cacheblend_module, "BLOCK_ROWS", block):
            got, _ = rule.rank(s.model, cache, asked(bench))
    full = dense_prefill(s.model, cache.token_ids.tolist())
    context = dense_stitched(s.model, s.request.prefix, s.request.documents, s.order)
    stale = dense_recompute(s.model, context, [])
    want = torch.zeros(s.total, dtype=torch.float64)
    for letter, true, old in (("k", full.keys, stale.keys), ("v", full.values, stale.values)):
        if letter in deviation:
            want += (true[1] - old[1]).square().mean(dim=(0, 2))
    assert_close(got, want, what="deviations", tolerance=ROUNDED)


@pytest.mark.parametrize("deviation", ["kv", "none"])
@pytest.mark.parametrize("attention", ["true", "stitched"])
@given(s=scenarios(min_documents=2))
def test_oracle_equals_the_dense_oracle(deviation: str, attention: str, s: Scenario) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        spec = f"oracle:attention={attention},deviation={deviation}"
        rule: Any = selectors.resolve(spec)
        got, _ = rule.rank(s.model, cache, asked(bench))
    assert rule.evaluation_only
    stale = dense_stitched(s.model, s.request.prefix, s.request.documents, s.order)
    full = dense_prefill(s.model, stale.token_ids)
    true = dataclasses.replace(stale, keys_before_rope=full.keys_before_rope, values=full.values)
    rotated = dense_recompute(s.model, stale, []).keys
    per_layer = []
    for layer in range(3):
        error = torch.ones(s.total, dtype=torch.float64)
        if deviation != "none":
            error = torch.zeros(s.total, dtype=torch.float64)
            for old, new in ((rotated, full.keys), (stale.values, full.values)):
                size = new[layer].square().sum(dim=(0, 2))
                error += (old[layer] - new[layer]).square().sum(dim=(0, 2)).sqrt() / (
                    size.mean().sqrt()
                )
        seen = true if attention == "true" else stale
        per_layer.append(dense_scores(s.model, seen, s.request.prompt, layers=[layer]) * error)
    assert_close(got, torch.stack(per_layer).mean(0), what="oracle scores", tolerance=ROUNDED)


def query_attention(s: Scenario, query: list[int]) -> tuple[Any, list[Tensor]]:
    """The dense stitched context, and the query's attention to it in each layer, `[H, Q, T]`."""
    context = dense_stitched(s.model, s.request.prefix, s.request.documents, s.order)
    total = len(context.token_ids)
    slots = torch.arange(total, total + len(query))
    mask = torch.arange(total + len(query))[None] <= slots[:, None]
    room = (0, 0, 0, len(query))
    padded = [torch.nn.functional.pad(x, room) for x in (context.keys_before_rope, context.values)]
    positions = range(total + len(query))
    trace = dense_rows(s.model, query, slots, positions, mask, *padded)
    return context, [attention[:, :, :total] for attention in trace.attention]


@given(s=scenarios())
def test_value_aware_weighs_by_values(s: Scenario) -> None:
    with prepared(s.model, s.request) as bench:
        rule: Any = selectors.resolve("value-aware:layers=0+2,reduction=sum")
        got, _ = rule.rank(s.model, bench.stitch(s.order), asked(bench))
    context, attention = query_attention(s, s.request.prompt)
    want = [
        attention[layer].mean(0).sum(0) * context.values[layer].abs().sum(-1).mean(0)
        for layer in (0, 2)
    ]
    assert_close(got, torch.stack(want).mean(0), what="scores", tolerance=ROUNDED)


def raised(
    scores: Tensor, cache: ifkv.StitchedCache, queue: list[int], share: float
) -> list[float]:
    """Scores in which a queue has its share, by its definition, one number at a time."""
    ranked = sorted(scores[cache.document_slices[0].stop :].tolist(), reverse=True)
    want = scores.tolist()
    for number, slot in enumerate(queue):
        place = math.floor(number / Fraction(str(share))) - number
        if place < len(ranked) and want[slot] <= ranked[place]:
            want[slot] = torch.tensor(ranked[place]).nextafter(torch.tensor(math.inf)).item()
    return want


def check_shares(got: list[float], queue: list[int], plain: Tensor, share: float) -> None:
    """Of the n highest, a share and all that is left over come from where they should."""
    if len(set(plain.tolist())) < len(plain):
        return  # equal scores may go either way
    order = sorted(range(len(got)), key=lambda slot: -got[slot])
    for count in range(1, len(got) + 1):
        assert set(order[:count]) >= set(queue[: math.ceil(count * Fraction(str(share)))])
    others = [slot for slot in order if slot not in queue]
    assert others == sorted(others, key=lambda slot: -float(plain[slot])), "the others keep theirs"


@given(s=scenarios(), sinks=st.integers(0, 4), share=st.sampled_from([0.5, 0.3, 0.07]))
def test_beginnings_get_a_share_and_value_aware_decides_the_rest(
    s: Scenario, sinks: int, share: float
) -> None:
    rule: Any = selectors.SinkAware(sinks=sinks, share=share)
    plain: Any = selectors.resolve("value-aware:layers=0.0-1.0,query=question")
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        scores, cost = plain.rank(s.model, cache, asked(bench))
        got, spent = rule.rank(s.model, cache, asked(bench))
    assert spent == cost
    later = cache.document_slices[1:]
    queue = [r.start + i for i in range(sinks) for r in later if r.start + i < r.stop]
    assert got.tolist() == raised(scores, cache, queue, share)
    first = cache.document_slices[0].stop
    check_shares(got[first:].tolist(), [slot - first for slot in queue], scores[first:], share)


def test_beginnings_that_cannot_be_chosen_take_no_place_in_the_queue() -> None:
    """As in a conversation, where only further documents' slots are candidates."""
    rule: Any = selectors.SinkAware(sinks=1, share=0.5)
    plain: Any = selectors.resolve("value-aware:layers=0.0-1.0,query=question")
    with prepared(shared_tiny_model("llama"), TOKENS) as bench:
        cache = bench.stitch()
        last = cache.document_slices[-1]
        view = cache.choosing(torch.arange(last.start, last.stop))
        scores, _ = plain.rank(bench.model, view, asked(bench))
        got, _ = rule.rank(bench.model, view, asked(bench))
    assert got[last.start] >= scores[last].max()
    assert torch.equal(got[: last.start], scores[: last.start])
    assert torch.equal(got[last.start + 1 :], scores[last.start + 1 :])


@given(s=scenarios(), power=st.sampled_from([0.5, 1.0]), deviation=st.sampled_from(["v", "kv"]))
def test_deviation_aware_weighs_what_is_read_by_how_far_it_moves(
    s: Scenario, power: float, deviation: Any
) -> None:
    """Against the truth: the second layer's rows of a full recompute."""
    rule: Any = selectors.DeviationAware(power=power, deviation=deviation)
    plain: Any = selectors.resolve("value-aware:layers=0.0-1.0")
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        norms, one = plain.rank(s.model, cache, asked(bench))
        other = selectors.CacheBlend().rank(s.model, cache, asked(bench))[1]
        got, cost = rule.rank(s.model, cache, asked(bench))
        truth = cache.clone()
        ifkv.recompute(s.model, truth, range(cache.document_slices[0].stop, s.total))
    assert cost == one + other
    moved = torch.zeros(s.total)
    for rows_of in (values_of, keys_of) if deviation == "kv" else (values_of,):
        difference = (rows_of(truth) - rows_of(cache))[1, :, : s.total]
        moved += difference.square().mean(dim=(0, 2)).float()
    # Raised until the mean square stands alone: a root would make much of rounding around 0.
    got, want = got ** (2 / power), norms ** (2 / power) * moved
    first = cache.document_slices[0].stop
    assert_close(got[first:], want[first:], what="scores", tolerance=1e-4)


@given(s=scenarios(), block=st.integers(1, 7))
def test_entropy_weighs_by_focus(s: Scenario, block: int) -> None:
    """Against the definition, one head and query token at a time; keys in blocks or at once."""
    with (
        prepared(s.model, s.request) as bench,
        patch("ifkv.selectors.entropy.NORM_BLOCK", block),
    ):
        rule: Any = selectors.resolve("entropy:layers=1+2,query=question")
        got, _ = rule.rank(s.model, bench.stitch(s.order), asked(bench))
    _, attention = query_attention(s, s.request.query)
    want = torch.zeros(s.total, dtype=torch.float64)
    for layer in (1, 2):
        heads, queries, total = attention[layer].shape
        for h in range(heads):
            for i in range(queries):
                row = attention[layer][h, i]
                focus = 1.0
                if total > 1:
                    spread = (
                        torch.distributions.Categorical(probs=row).entropy() if row.sum() else 0
                    )
                    focus = 1 - spread / torch.log(torch.tensor(float(total))) if row.sum() else 0.0
                want += focus * row / heads / 2
    assert_close(got, want, what="scores", tolerance=1e-4)


@given(s=scenarios(min_documents=2), shortlist=st.sampled_from([0.1, 0.5, 1.0]))
def test_prophetkv_fuses_what_layers_propose(s: Scenario, shortlist: float) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        rule: Any = selectors.resolve(f"prophetkv:shortlist={shortlist}")
        got, _ = rule.rank(s.model, cache, asked(bench))
        per_layer = [
            ifkv.score(s.model, cache, s.request.query, layers=[n], reduction="sum")
            for n in range(3)
        ]
    start = cache.document_slices[0].stop
    proposed = -(-Fraction(str(shortlist)) * (s.total - start) // 1)
    want = [0.0] * s.total
    for scores in per_layer:
        shares = {j: float(scores[j]) for j in range(start, s.total)}
        mass = sum(shares.values())
        order = sorted(shares, key=lambda j: (-shares[j], j))
        for place, slot in enumerate(order):
            share = shares[slot] / mass if mass else 0.0
            want[slot] += share / 3 * (1.001 if place < proposed else 0.001)
    assert_close(got, torch.tensor(want), what="scores", tolerance=1e-4)


def test_epic_takes_documents_heads() -> None:
    with prepared(shared_tiny_model("llama"), TOKENS) as bench:
        cache = bench.stitch()  # documents at slots 2-4, 5-9, 10-11, 12-15
        assert chosen("epic", bench, cache, 0.3).slots.tolist() == [5, 6, 10, 12]
        assert chosen("epic:by=tokens", bench, cache, 0.4).slots.tolist() == [5, 6, 10, 11, 12, 13]
        limited = chosen("epic:by=tokens,tokens=1", bench, cache, 0.9)
        assert limited.slots.tolist() == [5, 10, 12]
        assert chosen("epic:tokens=2", bench, cache, 1).slots.tolist() == [5, 6, 10, 11, 12, 13]
        assert chosen("recency", bench, cache, 0.2).slots.tolist() == [13, 14, 15]


def test_random_depends_on_its_seed_alone() -> None:
    with prepared(shared_tiny_model("llama"), TOKENS) as bench:
        cache = bench.stitch()
        picks = [chosen(f"random:seed={seed}", bench, cache, 0.3).slots for seed in range(8)]
        assert torch.equal(picks[0], chosen("random", bench, cache, 0.3).slots)
    assert len({tuple(pick.tolist()) for pick in picks}) > 4
