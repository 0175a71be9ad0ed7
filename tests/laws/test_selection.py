"""Laws 26 and 27: the selection made from scores, and the order of documents."""

from fractions import Fraction
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import ifkv
from dense_attention import often
from ifkv.steps.select import budget
from ifkv.testing import shared_tiny_model
from ifkv.testing.strategies import Request
from scenario import Bench, Scenario, prepared, scenarios


@often
@given(
    numerator=st.integers(0, 1000),
    # Multiples of 100 often make a whole number that float arithmetic misses.
    total=st.integers(1, 50).map(lambda k: 100 * k) | st.integers(1, 1_000_000),
)
@example(numerator=290, total=100)
@example(numerator=580, total=50)
def test_law_26_the_budget_is_exact(numerator: int, total: int) -> None:
    """Whole-number arithmetic on the decimal that was written, as `numerator / 1000` is."""
    expected = max(1, numerator * total // 1000) if numerator else 0
    assert budget(total, numerator / 1000) == expected


@often
@given(ratio=st.floats(0, 1, exclude_min=True), total=st.integers(1, 100_000))
def test_law_26_any_float_is_taken_as_it_prints(ratio: float, total: int) -> None:
    share = Fraction(repr(ratio)) * total
    assert budget(total, ratio) == max(1, share.numerator // share.denominator)


def cache_of(lengths: list[int], prefix: int) -> ifkv.StitchedCache:
    model = shared_tiny_model("llama")
    documents = [[1] * length for length in lengths]
    with prepared(model, Request([2] * prefix, documents, [3], [4])) as bench:
        return bench.stitch()


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    prefix=st.integers(0, 3),
    ratios=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    protect=st.booleans(),
    data=st.data(),
)
def test_law_26_selections(
    lengths: list[int],
    prefix: int,
    ratios: tuple[float, float],
    protect: bool,
    data: st.DataObject,
) -> None:
    """Against a sort by score, then slot: within the budget, ascending, unique, nested."""
    cache = cache_of(lengths, prefix)
    total = cache.context_length
    few = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1, width=32)  # with many ties
    scores = data.draw(st.lists(few, min_size=total, max_size=total), label="scores")
    first = prefix + lengths[0] if protect else 0
    ranked = sorted(range(first, total), key=lambda slot: (-scores[slot], slot))
    chosen = []
    for ratio in sorted(ratios):
        got = ifkv.select(cache, torch.tensor(scores), ratio=ratio, protect_first=protect)
        assert got.dtype == torch.long
        assert got.tolist() == sorted(ranked[: budget(total, ratio)])
        chosen.append(set(got.tolist()))
    assert chosen[0] <= chosen[1]


def test_law_26_protects_the_first_document_by_default() -> None:
    cache = cache_of([2, 3], 1)
    scores = torch.tensor([9.0, 8.0, 7.0, 1.0, 3.0, 2.0])
    assert ifkv.select(cache, scores, ratio=0.5).tolist() == [3, 4, 5]
    assert ifkv.select(cache, scores, ratio=1).tolist() == [3, 4, 5]
    assert ifkv.select(cache, scores, ratio=0.35).tolist() == [4, 5]
    assert ifkv.select(cache, scores).tolist() == [4]
    assert ifkv.select(cache, scores, ratio=0.35, protect_first=False).tolist() == [0, 1]


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), "0.5", True])
def test_law_26_ratios_outside_are_refused(ratio: object) -> None:
    with pytest.raises(ifkv.IfkvError, match="ratio"):
        ifkv.select(cache_of([2], 0), torch.ones(2), ratio=ratio)


def expected_order(bench: Bench, query: list[int], ratio: float) -> list[int]:
    """By the definition: hits among the top slots per token, richest last, ties as given."""
    cache = bench.stitch(geometry="hl-tp")
    scores = ifkv.score(bench.model, cache, query).tolist()
    slots = range(cache.prefix_length, cache.context_length)
    top = sorted(slots, key=lambda slot: (-scores[slot], slot))
    selected = set(top[: budget(cache.context_length, ratio)])
    hits = [
        Fraction(len(selected & set(range(rows.start, rows.stop))), rows.stop - rows.start)
        for rows in cache.document_slices
    ]
    return [index for _, index in sorted((hit, index) for index, hit in enumerate(hits))]


@given(s=scenarios(), ratio=st.floats(0, 1) | st.sampled_from([0.15, 0.5]))
def test_law_27_reorder_permutes_documents_richest_last(s: Scenario, ratio: float) -> None:
    with prepared(s.model, s.request) as bench:
        order = ifkv.reorder(s.model, bench.documents, s.request.query, ratio=ratio)
        assert order == expected_order(bench, s.request.query, ratio)
        cache = bench.stitch(order)
    # The prefix first, then whole documents, their tokens in order.
    expected = s.request.prefix + [t for i in order for t in s.request.documents[i]]
    assert cache.token_ids.tolist() == expected
    if ratio in (0, 1):  # nothing or everything is selected: all are equally rich
        assert order == sorted(order)


def test_law_27_the_share_counts_and_not_the_number() -> None:
    """Three hits of six are poorer than two of two; equal shares keep their order."""
    model = shared_tiny_model("llama")
    request = Request([1], [[2, 3], [4, 5, 6, 7, 8, 9], [10, 11], [12, 13]], [14], [15])
    scores = torch.tensor([99.0, 9, 9, 9, 9, 9, 0, 0, 0, 9, 0, 1, 9])  # the prefix's does not count
    with (
        prepared(model, request) as bench,
        patch.object(ifkv.steps.reorder, "score", lambda *args, **kwargs: scores.clone()),
    ):
        order = ifkv.reorder(model, bench.documents, request.query, ratio=0.54)  # 7 of 13
    assert order == [1, 2, 3, 0]
