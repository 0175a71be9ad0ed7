"""Laws 23-27: scores, the selection made from them, and the order of documents."""

from fractions import Fraction
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ifkv
from ifkv.backends import norms
from ifkv.positions import GEOMETRIES
from ifkv.selection import budget
from ifkv.testing import (
    assert_bit_equal,
    assert_close,
    dense_scores,
    dense_stitched,
    shared_tiny_model,
)
from ifkv.testing.strategies import Request
from scenario import Bench, Scenario, keys_of, poison, prepared, scenarios, values_of

ROUNDED = 1e-6
"""Scores are handed out as float32, though they are made in float64 here."""

geometries = st.sampled_from(GEOMETRIES)
reductions = st.sampled_from(["l2", "sum"])
layer_choices = st.lists(st.integers(0, 2), min_size=1, unique=True)


def per_document(cache: ifkv.StitchedCache, scores: Tensor) -> list[Tensor]:
    """Scores of each document, in the order the documents were given."""
    parts = [scores[rows] for rows in cache.document_slices]
    return [parts[cache.order.index(i)] for i in range(len(parts))]


@given(
    s=scenarios(),
    geometry=geometries,
    reduction=reductions,
    layers=layer_choices,
    negative=st.booleans(),
)
def test_scores_equal_the_oracle_in_every_geometry(
    s: Scenario, geometry: str, reduction: str, layers: list[int], negative: bool
) -> None:
    chosen = [layer - 3 for layer in layers] if negative else layers
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order, geometry)
        got = ifkv.score(s.model, cache, s.request.query, layers=chosen, reduction=reduction)
    assert got.dtype == torch.float32
    expected = dense_scores(
        s.model,
        dense_stitched(s.model, s.request.prefix, s.request.documents, s.order),
        s.request.query,
        layers=layers,
        key_positions=cache.positions,
        query_positions=range(cache.query_position, cache.query_position + len(s.request.query)),
        reduction=reduction,
    )
    assert_close(got, expected, what=f"{reduction} scores", tolerance=ROUNDED)


@given(s=scenarios())
def test_default_layers_and_reduction(s: Scenario) -> None:
    """55 to 70 % of three layers are the last two; L2 is what the released code takes."""
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        got = ifkv.score(s.model, cache, s.request.query)
        want = ifkv.score(s.model, cache, s.request.query, layers=[1, -1], reduction="l2")
    assert_bit_equal(got, want, what="scores")


@given(s=scenarios())
def test_law_23_hl_tp_scores_follow_their_documents(s: Scenario) -> None:
    with prepared(s.model, s.request) as bench:
        first, second = (bench.stitch(order, "hl-tp") for order in (None, s.order))
        scores = [ifkv.score(s.model, cache, s.request.query) for cache in (first, second)]
    prefix = slice(0, first.prefix_length)
    assert_close(scores[1][prefix], scores[0][prefix], what="prefix scores", tolerance=ROUNDED)
    pairs = zip(per_document(second, scores[1]), per_document(first, scores[0]), strict=True)
    for index, (got, want) in enumerate(pairs):
        assert_close(got, want, what=f"scores of document {index}", tolerance=ROUNDED)


def test_law_23_global_scores_do_not() -> None:
    model = shared_tiny_model("llama")
    with prepared(model, Request([1], [[2, 3, 4], [5, 6, 7]], [8], [9])) as bench:
        first, second = bench.stitch(), bench.stitch([1, 0])
        scores = [ifkv.score(model, cache, [8]) for cache in (first, second)]
    difference = per_document(second, scores[1])[0] - per_document(first, scores[0])[0]
    assert difference.abs().max() > 1e-3


@given(s=scenarios(), geometry=geometries, layers=layer_choices)
def test_law_24_bounds_between_the_norms(s: Scenario, geometry: str, layers: list[int]) -> None:
    query = s.request.query
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order, geometry)
        l2, l1, one_l2, one_l1 = (
            ifkv.score(s.model, cache, ids, layers=layers, reduction=reduction).double()
            for ids in (query, query[:1])
            for reduction in ("l2", "sum")
        )
    assert (l2 >= 0).all()
    assert (l2 <= l1 + ROUNDED).all()
    assert (l1 <= len(query) ** 0.5 * l2 + ROUNDED).all()
    assert l1.sum() <= len(query) + ROUNDED
    assert_close(one_l1, one_l2, what="norms of one query token", tolerance=ROUNDED)


@given(s=scenarios(), geometry=geometries, block=st.integers(1, 7))
def test_law_25_scores_in_blocks_equal_one_shot(s: Scenario, geometry: str, block: int) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order, geometry)
        expected = ifkv.score(s.model, cache, s.request.query)
        with patch.object(norms, "NORM_BLOCK", block):
            got = ifkv.score(s.model, cache, s.request.query)
    assert_close(got, expected, what="scores", tolerance=ROUNDED)


@given(s=scenarios(), geometry=geometries)
def test_law_25_scoring_changes_nothing_and_sees_the_context_alone(
    s: Scenario, geometry: str
) -> None:
    """What lies behind the context, appended rows or free slots, has no influence."""
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order, geometry)
        before = cache.clone()
        expected = ifkv.score(s.model, cache, s.request.query)
        for pick in (keys_of, values_of):
            assert_bit_equal(pick(cache), pick(before), what="rows after scoring")
        assert cache.get_seq_length() == s.total
        poison(cache, slice(s.total, None), float("nan"))
        assert_bit_equal(
            ifkv.score(s.model, cache, s.request.query), expected, what="with poison behind"
        )
        if geometry == "global":
            ifkv.recompute(s.model, before, [], prompt_ids=s.request.prompt)
            got = ifkv.score(s.model, before, s.request.query)
            assert_bit_equal(got, expected, what="with a prompt appended")


@given(s=scenarios(), geometry=geometries)
def test_law_25_scoring_is_causal_among_query_tokens(s: Scenario, geometry: str) -> None:
    """Under the sum, the scores of a query's start are part of the whole query's."""
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order, geometry)
        whole, start = (
            ifkv.score(s.model, cache, ids, reduction="sum")
            for ids in (s.request.query, s.request.query[:1])
        )
    assert (start <= whole + ROUNDED).all()


@given(
    numerator=st.integers(0, 1000),
    total=st.integers(1, 5000) | st.sampled_from([10_000, 128_000, 1_000_000]),
)
def test_law_26_the_budget_is_exact(numerator: int, total: int) -> None:
    """Whole-number arithmetic on the decimal that was written, as `numerator / 1000` is."""
    expected = max(1, numerator * total // 1000) if numerator else 0
    assert budget(total, numerator / 1000) == expected


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
