"""The matrix of an evaluation: selectors, ratios and budgets as they are written."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifkv.errors import InvalidInputError
from ifkv.evaluation import matrix
from ifkv.evaluation.budgets import label, parse_budgets
from ifkv.evaluation.specs import numbers, split_specs
from ifkv.selectors import Budget

SHARES = st.integers(0, 100).map(lambda share: share / 100)


WINDOWS = st.none() | st.integers(0, 9).map(lambda half: 2 * half + 1)


def test_lists_of_a_command_line() -> None:
    assert split_specs("a:x=1,y=2; b ,c:z=3") == ["a:x=1,y=2", "b", "c:z=3"]
    for bad in ("x=1", "epic,x=1"):
        with pytest.raises(InvalidInputError, match="an option without a selector"):
            split_specs(bad)
    for bad in ("", "a,b"):
        with pytest.raises(InvalidInputError):
            numbers(bad)


@pytest.mark.parametrize(
    ("wanted", "ratios", "options"),
    [
        ([], [0.1], {}),
        (["epic"], [], {}),
        (["epic"], [1.5], {}),
        (["nonsense"], [0.1], {}),
        (["attention-norm"], [0.1], {"geometries": ["flat"]}),
    ],
)
def test_a_bad_matrix_is_refused(wanted: list[str], ratios: list[float], options: Any) -> None:
    with pytest.raises(InvalidInputError):
        matrix(wanted, ratios, **options)


def test_geometries_multiply_the_selectors_that_have_them() -> None:
    ways = matrix(["attention-norm", "epic"], [0.1], geometries=["global", "hl-tp"])
    assert [way.name for way in ways] == [
        "stitch only",
        "attention-norm",
        "attention-norm:geometry=hl-tp",
        "epic",
    ]


@given(
    st.one_of(
        st.builds(Budget, ratio=SHARES, window=WINDOWS),
        st.builds(Budget, ratio=SHARES, sentences=st.booleans()),
        st.builds(Budget, number=st.integers(0, 10**9), window=WINDOWS),
        st.builds(Budget, mass=SHARES, cap=SHARES, sentences=st.booleans()),
    )
)
def test_a_budget_is_read_as_it_is_shown(budget: Budget) -> None:
    assert parse_budgets(label(budget)) == [budget]


@pytest.mark.parametrize(
    "text",
    ["many", "number=1.5", ".1+", ".1+sentences=1", "cap=.2", ".1+ratio=.2", "2", ".1+cap=.1"],
)
def test_a_bad_budget_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_budgets(text)
