"""Options of selectors, the registry, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ifkv
from ifkv import selectors
from ifkv.errors import FingerprintMismatchError, InvalidInputError, NotPatchedError
from ifkv.selectors import Budget, Cost, Layers, Ranked, Request, registry
from ifkv.testing import shared_tiny_model, tiny_model
from ifkv.testing.strategies import Request as Tokens
from scenario import prepared

PUBLISHED = [
    "attention-norm",
    "cacheblend",
    "deviation-aware",
    "entropy",
    "epic",
    "oracle",
    "prophetkv",
    "random",
    "recency",
    "sensitivity-aware",
    "sink-aware",
    "two-round",
    "value-aware",
]


def test_names_are_the_published_ones_and_each_names_its_paper() -> None:
    assert set(selectors.names()) >= set(PUBLISHED)
    for name in PUBLISHED:
        cls = selectors.selector_class(name)
        assert cls.name == name
        assert cls.paper
        assert cls.__doc__
        assert cls.evaluation_only == (name == "oracle")
        assert str(cls()) == name


@pytest.mark.parametrize(
    "spec",
    [
        "attention-norm:layers=0.5-1.0,query=both,reduction=sum,geometry=tl-tp",
        "attention-norm:layers=-2+-1",
        "cacheblend:deviation=kv",
        "deviation-aware:power=1.0,deviation=kv,layers=0.5-1.0",
        "sink-aware:query=prompt,sinks=2,share=0.5",
        "sensitivity-aware:layers=0.2-0.7,power=0.5",
        "epic:by=tokens,tokens=16",
        "random:seed=7",
        "two-round:share=0.25",
        "prophetkv:shortlist=0.5",
    ],
)
def test_a_selector_is_its_string(spec: str) -> None:
    selector = selectors.resolve(spec)
    assert str(selector) == spec
    assert selectors.resolve(str(selector)) == selector
    assert selectors.resolve(selector) is selector


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("attention", "choose one of attention-norm"),
        ("", "choose one of"),
        (7, "give a name"),
        ("random:", "name=value"),
        ("random:seed", "name=value"),
        ("random:seed=", "name=value"),
        ("random:seed=x", "whole number"),
        ("random:seed=1.5", "whole number"),
        ("random:seed=1,seed=2", "twice"),
        ("random:layers=1", "it has seed"),
        ("recency:seed=1", "it has none"),
        ("attention-norm:query=answer", "prompt or question or both"),
        ("attention-norm:layers=0.9-0.1", "behind its start"),
        ("attention-norm:layers=0.5-1.5", "between 0 and 1"),
        ("attention-norm:layers=top", "range of the depth"),
        ("epic:tokens=-1", "0 \\(no limit\\)"),
        ("sink-aware:sinks=-1", "no share for the beginnings"),
        ("sensitivity-aware:power=0", r"power is 0\.0, .* without sensitivities it is sink-aware"),
        ("sensitivity-aware:share=2", r"sensitivity-aware's option share is 2\.0"),
        ("sink-aware:share=0", r"share is 0\.0, .* set sinks=0"),
        ("deviation-aware:power=0", r"power is 0\.0, .* without the deviation it is value-aware"),
        ("sink-aware:share=1.5", r"share is 1\.5, .* at most 0\.5"),
        ("two-round:share=1", "between 0 and 1"),
        ("two-round:share=nan", "must be a number"),
        ("prophetkv:shortlist=0", "above 0"),
    ],
)
def test_bad_names_and_options_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        selectors.resolve(spec)


def test_options_in_python_are_checked_too() -> None:
    wrong: Any = "bogus"
    with pytest.raises(InvalidInputError, match="l2 or sum"):
        selectors.AttentionNorm(reduction=wrong)
    assert selectors.AttentionNorm(layers=Layers.of([-1])).layers.within(4) == [3]
    with pytest.raises(InvalidInputError, match="whole numbers"):
        Layers.of([1.5])
    with pytest.raises(InvalidInputError, match="at least one"):
        Layers.of([9]).within(4)


@given(depth=st.integers(1, 80), start=st.floats(0, 0.99), width=st.floats(0.01, 1))
def test_a_range_of_the_depth_has_layers(depth: int, start: float, width: float) -> None:
    layers = Layers(depth=(start, min(1.0, start + width))).within(depth)
    assert layers == list(range(layers[0], layers[-1] + 1))
    assert 0 <= layers[0] <= layers[-1] < depth


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = dict(registry._REGISTRY)
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


class Late(Ranked):
    """Slots by their number; not a dataclass, so without options."""

    name: ClassVar[str] = "late"
    paper: ClassVar[str] = "unpublished"

    def rank(self, model: Any, cache: ifkv.StitchedCache, request: Request) -> tuple[Tensor, Cost]:
        return torch.arange(cache.context_length, dtype=torch.float32), Cost(flops=1)


@pytest.mark.usefixtures("clean_registry")
def test_your_own_selector() -> None:
    assert selectors.register(Late) is Late
    assert selectors.register(Late) is Late  # as when a notebook's cell runs twice
    assert "late" in selectors.names()
    assert str(selectors.resolve("late")) == "late"
    with pytest.raises(InvalidInputError, match="it has none"):
        selectors.resolve("late:a=1")
    tokens = Tokens([1], [[2, 3], [4, 5, 6]], [7], [8])
    with prepared(shared_tiny_model("llama"), tokens) as bench:
        got = selectors.resolve("late").select(
            bench.model, bench.stitch(), Request([8], [7]), Budget(number=2)
        )
    assert got.slots.tolist() == [4, 5]
    assert got.cost == Cost(flops=1)


@pytest.mark.usefixtures("clean_registry")
def test_what_cannot_be_registered() -> None:
    wrong: Any = dict
    with pytest.raises(InvalidInputError, match="no selector"):
        selectors.register(wrong)
    for changes, message in [
        ({"name": "random"}, "taken by Random"),
        ({"name": "Not A Name"}, "lower-case"),
        ({"name": "fine", "paper": None}, "paper"),
        ({"name": "fine", "rank": Ranked.rank}, "without arguments"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            selectors.register(type("Other", (Late,), changes))
    nameless: Any = type("Nameless", (selectors.Selector,), {"select": None})
    with pytest.raises(InvalidInputError, match="name is None"):
        selectors.register(nameless)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_selectors_refuse_what_is_not_theirs(name: str, ratio: float) -> None:
    model, other = shared_tiny_model("llama"), shared_tiny_model("llama", seed=1)
    selector = selectors.resolve(name)
    tokens = Tokens([1], [[2, 3], [4, 5, 6]], [7], [8])
    with prepared(model, tokens) as bench:
        cache = bench.stitch()
        with ifkv.patch(other), pytest.raises(FingerprintMismatchError):
            selector.select(other, cache, Request([8], [7]), ratio)
        wrong: Any = bench.documents
        with pytest.raises(InvalidInputError, match=r"ifkv\.stitch"):
            selector.select(model, wrong, Request([8], [7]), ratio)
        with pytest.raises(InvalidInputError, match="ratio"):
            selector.select(model, cache, Request([8], [7]), 1.5)
    with pytest.raises(NotPatchedError):
        selector.select(model, cache, Request([8], [7]), ratio)


@pytest.mark.parametrize("name", ["attention-norm", "two-round", "entropy", "oracle"])
def test_bad_queries_are_refused(name: str) -> None:
    tokens = Tokens([1], [[2, 3], [4, 5, 6]], [7], [8])
    with prepared(shared_tiny_model("llama"), tokens) as bench:
        for prompt in ([], [1000]):
            with pytest.raises(InvalidInputError, match="query"):
                selectors.resolve(name).select(
                    bench.model, bench.stitch(), Request(prompt, [7]), 0.5
                )


def test_cacheblend_needs_a_second_layer() -> None:
    model = tiny_model("llama", num_layers=1)
    with (
        prepared(model, Tokens([1], [[2, 3], [4, 5, 6]], [7], [8])) as bench,
        pytest.raises(InvalidInputError, match="second layer"),
    ):
        selectors.resolve("cacheblend").select(model, bench.stitch(), Request([8], [7]), 0.5)
