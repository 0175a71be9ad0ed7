"""Laws 23-25: scores."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ifkv
from ifkv.backends import norms
from ifkv.cache.layout import GEOMETRIES
from ifkv.testing import (
    assert_bit_equal,
    assert_close,
    dense_scores,
    dense_stitched,
    shared_tiny_model,
)
from ifkv.testing.strategies import Request
from scenario import Scenario, keys_of, poison, prepared, scenarios, values_of

ROUNDED = 1e-6
"""Scores are handed out as float32, though they are made in float64 here."""

geometries = st.sampled_from(GEOMETRIES)
layer_choices = st.lists(st.integers(0, 2), min_size=1, unique=True)


def per_document(cache: ifkv.StitchedCache, scores: Tensor) -> list[Tensor]:
    """Scores of each document, in the order the documents were given."""
    parts = [scores[rows] for rows in cache.document_slices]
    return [parts[cache.order.index(i)] for i in range(len(parts))]


@pytest.mark.parametrize("reduction", ["l2", "sum"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@given(s=scenarios(), layers=layer_choices, negative=st.booleans())
def test_scores_equal_the_oracle_in_every_geometry(
    geometry: str, reduction: str, s: Scenario, layers: list[int], negative: bool
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
