"""What every selector obeys: budgets, determinism, costs, and that looking changes nothing."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ifkv
from ifkv import selectors
from ifkv.errors import InvalidInputError
from ifkv.selectors import Cost, Ranked, Request
from ifkv.steps.select import budget
from ifkv.testing import (
    assert_bit_equal,
    assert_close,
    dense_prefill,
    shared_tiny_model,
)
from scenario import EXACT, Scenario, keys_of, prepared, scenarios, values_of
from selecting import ROUNDED, SPECS, TOKENS, asked, chosen

RANKED = [s for s in SPECS if isinstance(selectors.resolve(s), Ranked)]


every = pytest.mark.parametrize("spec", SPECS)


ranked = pytest.mark.parametrize("spec", RANKED)


@every
@given(s=scenarios())
def test_ratio_0_is_stitch_only_and_1_full_prefill(spec: str, s: Scenario) -> None:
    with prepared(s.model, s.request) as bench:
        stitched, whole = bench.stitch(s.order), bench.stitch(s.order)
        nothing = chosen(spec, bench, stitched, 0)
        assert nothing.slots.dtype == torch.long
        assert nothing.slots.tolist() == []
        assert nothing.cost == Cost()
        everything = chosen(spec, bench, whole, 1)
        logits = ifkv.recompute(s.model, whole, everything.slots, prompt_ids=s.request.prompt)
    full = dense_prefill(s.model, [*stitched.token_ids.tolist(), *s.request.prompt])
    assert_close(logits, full.logits[-1], what="logits at ratio 1", tolerance=EXACT)


@every
@given(s=scenarios(min_documents=2), ratio=st.floats(0.01, 0.99))
def test_size_candidates_determinism_and_an_untouched_cache(
    spec: str, s: Scenario, ratio: float
) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        before = cache.clone()
        got = chosen(spec, bench, cache, ratio)
        for pick in (keys_of, values_of):
            assert_bit_equal(pick(cache), pick(before), what="rows after selecting")
        assert cache.get_seq_length() == s.total
        assert cache.prompt_ids is None
        again = chosen(spec, bench, cache, ratio)
    start = cache.document_slices[0].stop
    assert len(got.slots) == min(budget(s.total, ratio), s.total - start)
    assert got.slots.tolist() == sorted(set(got.slots.tolist()))
    assert int(got.slots[0]) >= start
    assert torch.equal(got.slots, again.slots)
    assert got.scores is not None
    assert again.scores is not None
    assert_bit_equal(got.scores, again.scores, what="scores")
    assert got.cost == again.cost


@ranked
@given(s=scenarios(min_documents=2), ratios=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_ranked_selections_are_nested(spec: str, s: Scenario, ratios: tuple[float, float]) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        few, many = (set(chosen(spec, bench, cache, r).slots.tolist()) for r in sorted(ratios))
    assert few <= many


@given(s=scenarios(min_documents=2), ratio=st.floats(0.05, 0.9))
def test_the_default_is_score_and_select(s: Scenario, ratio: float) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        got = chosen("attention-norm", bench, cache, ratio)
        scores = ifkv.score(s.model, cache, s.request.prompt)
    assert got.scores is not None
    assert_bit_equal(got.scores, scores, what="scores")
    assert torch.equal(got.slots, ifkv.select(cache, scores, ratio=ratio))


@given(s=scenarios(), reduction=st.sampled_from(["l2", "sum"]))
def test_both_queries_add_up(s: Scenario, reduction: str) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        rule = selectors.resolve(f"attention-norm:query=both,reduction={reduction},layers=0.0-1.0")
        assert isinstance(rule, Ranked)
        got, _ = rule.rank(s.model, cache, asked(bench))
        parts = [
            ifkv.score(s.model, cache, ids, layers=[0, 1, 2], reduction=reduction)
            for ids in (s.request.prompt, s.request.query)
        ]
    assert_close(got, parts[0] + parts[1], what="scores", tolerance=ROUNDED)


@given(s=scenarios())
def test_law_23_hl_tp_follows_its_documents_and_needs_them(s: Scenario) -> None:
    rule: Any = selectors.resolve("attention-norm:geometry=hl-tp")
    with prepared(s.model, s.request) as bench:
        caches = [bench.stitch(order) for order in (None, s.order)]
        scores = [rule.rank(s.model, cache, asked(bench))[0] for cache in caches]
        with pytest.raises(InvalidInputError, match="documents"):
            rule.rank(s.model, caches[0], Request([1], [1]))
    for place, index in enumerate(s.order):
        got = scores[1][caches[1].document_slices[place]]
        want = scores[0][caches[0].document_slices[index]]
        assert_close(got, want, what=f"scores of document {index}", tolerance=ROUNDED)


def test_another_geometry_refuses_other_documents() -> None:
    model = shared_tiny_model("llama")
    with prepared(model, TOKENS) as bench:
        cache = bench.stitch()
        others = ifkv.prefill_documents(model, [[9, 9, 9]] * 4, prefix=[1, 2])
        for documents in (bench.documents[:2], others):
            with pytest.raises(InvalidInputError, match="cache"):
                selectors.resolve("attention-norm:geometry=tl-tp").select(
                    model, cache, Request([1], [1], documents), 0.5
                )


@given(s=scenarios(min_documents=2), ratio=st.floats(0.1, 0.9))
def test_two_round_is_select_recompute_select(s: Scenario, ratio: float) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        got = chosen("two-round", bench, cache, ratio)
        prompt = s.request.prompt
        whole = ifkv.select(cache, ifkv.score(s.model, cache, prompt), ratio=ratio)
        scores = ifkv.score(s.model, cache, prompt).tolist()
        best = sorted(whole.tolist(), key=lambda slot: (-scores[slot], slot))[: len(whole) // 2]
        twin = bench.recomputed(best, s.order)
        second = ifkv.score(s.model, twin, prompt)
    left = [j for j in range(cache.document_slices[0].stop, s.total) if j not in best]
    left.sort(key=lambda slot: (-float(second[slot]), slot))
    assert got.slots.tolist() == sorted(best + left[: len(whole) - len(best)])


def test_two_round_puts_the_cache_back_when_scoring_fails() -> None:
    model = shared_tiny_model("llama")
    real, calls = selectors.AttentionNorm.rank, []

    def second_fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    with prepared(model, TOKENS) as bench:
        cache = bench.stitch()
        before = cache.clone()
        with (
            patch.object(selectors.AttentionNorm, "rank", second_fails),
            pytest.raises(KeyboardInterrupt),
        ):
            chosen("two-round", bench, cache, 0.5)
        assert_bit_equal(keys_of(cache), keys_of(before), what="keys")
        assert_bit_equal(values_of(cache), values_of(before), what="values")
