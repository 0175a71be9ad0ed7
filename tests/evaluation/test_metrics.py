"""Metrics and statistics against hand-made examples and the laws they obey."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ifkv.errors import InvalidInputError
from ifkv.evaluation.bootstrap import Bootstrap, at_costs
from ifkv.evaluation.text_metrics import best, exact_match, normalise, token_f1
from ifkv.evaluation.token_metrics import agreement, divergence, negative_log_likelihood

WORDS = st.lists(st.sampled_from(["red", "The", "lamp.", "a", "door", "1889", "!"]), max_size=6)
TEXTS = WORDS.map(" ".join)
VALUES = st.lists(st.floats(-10, 10), min_size=1, max_size=12).map(np.array)


@pytest.mark.parametrize(
    ("answer", "gold", "f1", "em"),
    [
        ("The lamp", "lamp", 1.0, 1.0),
        ("a red lamp", "the lamp", 2 / 3, 0.0),
        ("lamp lamp", "lamp", 2 / 3, 0.0),
        ("door", "lamp", 0.0, 0.0),
        ("", "lamp", 0.0, 0.0),
        ("Lamp!", "lamp", 1.0, 1.0),
    ],
)
def test_f1_and_exact_match_by_hand(answer: str, gold: str, f1: float, em: float) -> None:
    assert token_f1(answer, gold) == pytest.approx(f1)
    assert exact_match(answer, gold) == em


@given(TEXTS, TEXTS)
def test_f1_lies_between_0_and_1_and_is_symmetric(one: str, two: str) -> None:
    assert 0 <= token_f1(one, two) <= 1
    assert token_f1(one, two) == token_f1(two, one)
    if exact_match(one, two) and normalise(one):
        assert token_f1(one, two) == 1


def test_the_best_gold_answer_counts() -> None:
    assert best(token_f1, "red lamp", ["door", "red lamp", "lamp"]) == 1


def test_divergence_by_hand() -> None:
    truth, other = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert divergence(truth, other) == pytest.approx(expected, rel=1e-6)
    assert divergence(truth, other) != pytest.approx(divergence(other, truth), rel=1e-3)
    assert divergence(other, other + 3) == pytest.approx(0, abs=1e-12), "logits have no zero"


def test_agreement_and_likelihood_by_hand() -> None:
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert agreement(truth, torch.tensor([[2.0, 0.0], [3.0, 1.0]])) == 0.5
    logits = torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log()
    expected = -(np.log(0.5) + np.log(0.8)) / 2
    assert negative_log_likelihood(logits, torch.tensor([0, 1])) == pytest.approx(expected)


@given(VALUES)
def test_an_interval_contains_its_mean(values: np.ndarray) -> None:
    found = Bootstrap(len(values), resamples=200).mean(values)
    assert found.value == pytest.approx(values.mean())
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9


def test_the_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = Bootstrap(400).mean(values)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=9).map(np.array))
def test_full_prefill_recovers_the_whole_gap_and_stitching_none(stitched: np.ndarray) -> None:
    boot, zero = Bootstrap(len(stitched), resamples=100), np.zeros(len(stitched))
    whole = boot.gap_share(zero, stitched, zero)
    assert (whole.value, whole.low, whole.high) == (1, 1, 1)
    assert boot.gap_share(stitched, stitched, zero).value == 0
    half = boot.gap_share(stitched / 2, stitched, zero)
    assert half.value == pytest.approx(0.5)


def test_the_gap_is_pooled_and_not_a_mean_of_ratios() -> None:
    stitched, way, zero = np.array([1.0, 99.0]), np.array([1.0, 0.0]), np.zeros(2)
    assert Bootstrap(2).gap_share(way, stitched, zero).value == pytest.approx(0.99)


def test_no_gap_is_not_a_number() -> None:
    assert np.isnan(Bootstrap(3).gap_share(np.ones(3), np.zeros(3), np.zeros(3)).value)


def test_pairing_sees_what_differs_the_same_way_everywhere() -> None:
    hard = np.random.default_rng(0).normal(scale=100, size=50)
    found = Bootstrap(50).difference(hard + 1, hard)
    assert found.excludes_zero
    assert found.low == pytest.approx(1)


def test_one_question_does_not_decide_the_typical_ratio() -> None:
    other = np.linspace(0.05, 0.2, 60)
    nearer = other / 2
    nearer[7] = 50.0
    boot = Bootstrap(60)
    assert nearer.sum() > other.sum()
    found = boot.typical_ratio(nearer, other)
    assert found.high < 0.9
    back = boot.typical_ratio(other, nearer)
    assert back.value == pytest.approx(1 / found.value)
    assert back.low == pytest.approx(1 / found.high)


def test_answers_as_good_as_full_prefills_are_not_told_apart() -> None:
    found = Bootstrap(3).typical_ratio(np.array([1e-9, 0.0, 1e-7]), np.array([1e-6, 1e-5, 0.0]))
    assert found.value == pytest.approx(1, abs=0.01)


def test_the_same_seed_draws_the_same_questions() -> None:
    values = np.arange(20.0)
    assert Bootstrap(20, seed=3).mean(values) == Bootstrap(20, seed=3).mean(values)
    assert Bootstrap(20, seed=3).mean(values) != Bootstrap(20, seed=4).mean(values)


@pytest.mark.parametrize("bad", [[1.0], [1.0, float("nan")]])
def test_a_value_for_every_question_is_wanted(bad: list[float]) -> None:
    with pytest.raises(InvalidInputError, match="one finite value for each of 2"):
        Bootstrap(2).mean(np.array(bad))


def test_quality_at_a_cost_lies_on_the_line_between_points() -> None:
    costs = np.array([[3.0, 1.0, 2.0]] * 5)
    quality = np.array([[0.0, 8.0, 4.0]] * 5)
    found = at_costs(costs, quality, np.array([1.0, 1.5, 2.75, 0.9, 3.1]))
    np.testing.assert_allclose(found, [8, 6, 1, np.nan, np.nan])
