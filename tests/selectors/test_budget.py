"""Budgets: how many slots they take, the smoothing of scores, and what they refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ifkv
from ifkv import selectors
from ifkv.errors import InvalidInputError
from ifkv.selectors import Budget
from ifkv.testing import shared_tiny_model, tiny_model, tiny_tokenizer
from ifkv.testing.strategies import Request as Tokens
from scenario import prepared

lengths_drawn = st.lists(st.integers(1, 7), min_size=2, max_size=4)
few = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1, width=32)


def cache_of(lengths: list[int], prefix: int = 1) -> ifkv.StitchedCache:
    tokens = Tokens([2] * prefix, [[1] * length for length in lengths], [3], [4])
    with prepared(shared_tiny_model("llama"), tokens) as bench:
        return bench.stitch()


def scores_for(data: st.DataObject, total: int) -> Tensor:
    return torch.tensor(data.draw(st.lists(few, min_size=total, max_size=total), label="scores"))


@given(lengths=lengths_drawn, number=st.integers(0, 30), data=st.data())
def test_a_number_is_that_many(lengths: list[int], number: int, data: st.DataObject) -> None:
    cache = cache_of(lengths)
    scores = scores_for(data, cache.context_length)
    got = Budget(number=number).pick(cache, scores)
    start = 1 + lengths[0]
    ranked = sorted(range(start, cache.context_length), key=lambda j: (-float(scores[j]), j))
    assert got.tolist() == sorted(ranked[:number])


@given(lengths=lengths_drawn, mass=st.floats(0.01, 0.99), cap=st.floats(0.05, 1), data=st.data())
def test_mass_is_the_fewest_that_cover_it(
    lengths: list[int], mass: float, cap: float, data: st.DataObject
) -> None:
    cache = cache_of(lengths)
    scores = scores_for(data, cache.context_length).double()
    start, total = 1 + lengths[0], cache.context_length
    ranked = sorted(range(start, total), key=lambda j: (-float(scores[j]), j))
    whole = float(scores[start:].sum())
    free = Budget(mass=mass).pick(cache, scores).tolist()
    assert free == sorted(ranked[: len(free)])
    assert float(scores[free].sum()) >= mass * whole - 1e-9
    if len(free) > 1:
        assert float(scores[ranked[: len(free) - 1]].sum()) < mass * whole + 1e-9
    capped = Budget(mass=mass, cap=cap).pick(cache, scores).tolist()
    assert capped == sorted(ranked[: min(len(free), max(1, int(cap * total + 1e-9)))])


def test_all_the_mass_is_everything_and_none_nothing() -> None:
    cache = cache_of([2, 3, 2])
    scores = torch.zeros(8)
    assert Budget(mass=1).pick(cache, scores).tolist() == [3, 4, 5, 6, 7]
    assert Budget(mass=0).pick(cache, scores).tolist() == []
    assert Budget(mass=0.5, cap=0).pick(cache, scores).tolist() == []
    assert Budget(mass=1).everything
    assert not Budget(mass=1, cap=0.5).everything


@given(lengths=lengths_drawn, window=st.sampled_from([1, 3, 5, 99]), data=st.data())
def test_a_window_averages_within_a_document(
    lengths: list[int], window: int, data: st.DataObject
) -> None:
    cache = cache_of(lengths)
    scores = scores_for(data, cache.context_length)
    got = Budget(ratio=0.5, window=window).smoothed(cache, scores, None)
    for rows in cache.document_slices:
        for slot in range(rows.start, rows.stop):
            near = scores[
                max(rows.start, slot - window // 2) : min(rows.stop, slot + window // 2 + 1)
            ]
            assert float(got[slot]) == pytest.approx(float(near.double().mean()), abs=1e-6)


def test_sentences_are_taken_whole() -> None:
    cache = cache_of([2, 3, 3])  # slots 3-5, 6-8
    scores = torch.tensor([9.0, 9, 9, 0.1, 0.5, 0.0, 0.2, 0.25, 0.9])
    groups = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 4])
    plain, whole = Budget(number=3), Budget(number=3, sentences=True)
    assert plain.pick(cache, scores).tolist() == [4, 7, 8]
    assert whole.pick(cache, scores, groups).tolist() == [6, 7, 8]
    assert dataclasses.replace(whole, number=2).pick(cache, scores, groups).tolist() == [6, 8]


def test_sentences_of_a_text() -> None:
    tokenizer = tiny_tokenizer()
    session = ifkv.Session(tiny_model(vocab_size=len(tokenizer)), tokenizer, prefix="Hi. ")
    texts = ['One. Two "three." Four', "Five\nsix?"]
    session.add(texts)
    ids = [session.format.document_ids(text) for text in texts]
    documents = ifkv.prefill_documents(session.model, ids, prefix=session.prefix_ids)
    cache = ifkv.stitch(session.model, documents)
    groups = selectors.sentence_groups(tokenizer, cache)
    pieces: list[str] = []
    for group in groups.unique().tolist():
        pieces.append(tokenizer.decode(cache.token_ids[groups == group]))
    assert pieces == [
        "Hi. ",
        "One.",
        ' Two "three.',
        '" Four\n',
        "\n",
        "Five\n",
        "six?",
        "\n",
        "\n",
    ]
    assert "".join(pieces) == tokenizer.decode(cache.token_ids)
    assert (groups.diff() >= 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"ratio": 0.1, "mass": 0.5}, "exactly one"),
        ({"ratio": 1.5}, "ratio"),
        ({"ratio": "0.1"}, "ratio"),
        ({"number": 1.5}, "number"),
        ({"number": -1}, "number"),
        ({"number": True}, "number"),
        ({"mass": 2}, "mass"),
        ({"mass": 0.5, "cap": -1}, "cap"),
        ({"ratio": 0.5, "cap": 0.5}, "cap"),
        ({"ratio": 0.5, "window": 2}, "odd"),
        ({"ratio": 0.5, "window": "3"}, "odd"),
        ({"ratio": 0.5, "window": 3, "sentences": True}, "two ways"),
    ],
)
def test_bad_budgets_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Budget(**options)


def test_bad_scores_and_groups_are_refused() -> None:
    cache = cache_of([2, 3])
    with pytest.raises(InvalidInputError, match="NaN"):
        Budget(number=2, window=3).pick(cache, torch.full((6,), float("nan")))
    with pytest.raises(InvalidInputError, match="shape"):
        Budget(number=2).pick(cache, torch.zeros(5))
    with pytest.raises(InvalidInputError, match="not negative"):
        Budget(mass=0.5).pick(cache, torch.tensor([0.0, 0, 0, 1, -1, 2]))
    with pytest.raises(InvalidInputError, match="sentence_groups"):
        Budget(number=2, sentences=True).pick(cache, torch.zeros(6))
    for groups in (torch.zeros(5, dtype=torch.long), torch.zeros(6)):
        with pytest.raises(InvalidInputError, match="groups"):
            Budget(number=2, sentences=True).pick(cache, torch.zeros(6), groups)
