"""Plans: the arithmetic at known rates, the choice among ratios, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from transformers import AutoConfig

import ifkv
from ifkv.cost import ModelShape, prefill_cost, recompute_cost, scoring_cost
from ifkv.errors import CalibrationWarning, InvalidInputError, UnsupportedModelError
from ifkv.planning import Planner, planner_for, shape_of_config
from ifkv.planning.calibration import Curve, Rates, kept
from ifkv.selectors import Request, resolve
from ifkv.testing import tiny_model
from rates import PASSES_COST, ROWS_COST, flat, ideal, machine

SHAPE = ModelShape.of(tiny_model("qwen3", num_layers=6))
RATE = 1e9
ratios = st.sampled_from([0.0, 0.01, 0.05, 0.15, 0.3, 0.7, 1.0])
sizes = st.integers(2, 5000)
# What plans know, and how it may be set.
PLANNED = (
    "sink-aware",
    "value-aware:query=both,layers=0+2",
    "attention-norm",
    "attention-norm:query=question,layers=0.0-1.0",
)


@given(
    tokens=sizes,
    documents=st.integers(1, 20),
    prompt=st.integers(1, 80),
    question=st.integers(1, 80),
    ratio=ratios,
    selector=st.sampled_from(PLANNED),
)
def test_at_one_rate_a_plan_is_the_counted_arithmetic(
    tokens, documents, prompt, question, ratio, selector
) -> None:
    documents = min(documents, tokens)
    plan = Planner(SHAPE, ideal(SHAPE, RATE)).plan(
        tokens,
        documents=documents,
        prompt=prompt,
        question=question,
        ratios=[ratio],
        selector=selector,
    )
    (forecast,) = plan.forecasts
    assert plan.prefill == pytest.approx(prefill_cost(SHAPE, tokens + prompt).flops / RATE)
    rule: Any = resolve(selector)
    lengths = {"prompt": [prompt], "question": [question], "both": [prompt, question]}
    layers = rule.layers.within(SHAPE.num_layers)
    scored = sum(scoring_cost(SHAPE, n, tokens, layers).flops for n in lengths[rule.query])
    scored = 0 if ratio in (0, 1) else scored
    assert forecast.select == pytest.approx(scored / RATE)
    first = tokens // documents
    # Rows spread evenly behind the first document.
    spread = first + (torch.arange(forecast.rows) + 0.5) / max(forecast.rows, 1) * (tokens - first)
    counted = recompute_cost(SHAPE, spread, tokens, prompt).flops / RATE
    assert forecast.recompute == pytest.approx(counted, rel=1e-6)
    assert forecast.hot == pytest.approx(forecast.stitch + forecast.select + forecast.recompute)


def test_plans_count_what_the_windows_of_layers_leave() -> None:
    shape = dataclasses.replace(SHAPE, windows=(None, 40, 300, 40, 4000, 300))
    tokens, prompt = 3000, 50
    plan = Planner(shape, ideal(shape, RATE)).plan(
        tokens, documents=3, prompt=prompt, ratios=[0.3], selector="attention-norm"
    )
    (forecast,) = plan.forecasts
    assert plan.prefill == pytest.approx(prefill_cost(shape, tokens + prompt).flops / RATE)
    rule: Any = resolve("attention-norm")
    scored = scoring_cost(shape, prompt, tokens, rule.layers.within(shape.num_layers)).flops
    assert forecast.select == pytest.approx(scored / RATE)
    spread = 1000 + (torch.arange(forecast.rows) + 0.5) / forecast.rows * 2000
    counted = recompute_cost(shape, spread, tokens, prompt).flops / RATE
    assert forecast.recompute == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize("selector", PLANNED)
def test_a_plan_counts_what_the_selector_reports(selector: str) -> None:
    model = tiny_model("qwen3", num_layers=6)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, [[5, 6, 7], [8, 9, 10, 11]], prefix=[1])
        cache = ifkv.stitch(model, documents)
        request = Request([20, 21, 22, 23], [20, 21])
        cost = resolve(selector).select(model, cache, request, 0.3).cost
    rates = dataclasses.replace(ideal(SHAPE, RATE), value_bytes=10.0)
    planner = Planner(SHAPE, rates)
    plan = planner.plan(8, documents=2, prompt=4, question=2, ratios=[0.3], selector=selector)
    values = resolve(selector).further_cost(SHAPE, 2, 8, resolve(selector).layers.within(6)).bytes
    passes = 2 if "both" in selector else 1
    assert plan.forecasts[0].select == pytest.approx(cost.flops / RATE + passes * values / 10)


def test_taking_the_size_of_values_takes_its_time() -> None:
    planner = Planner(SHAPE, machine(ROWS_COST.layer, value_bytes=100.0))
    seconds = [
        planner.plan(100, documents=4, prompt=5, ratios=[0.3], selector=rule).forecasts[0].select
        for rule in ("attention-norm:layers=0+1", "value-aware:layers=0+1")
    ]
    assert seconds[1] - seconds[0] == pytest.approx(2 * 100 * SHAPE.row_bytes / 100)


@given(
    tokens=sizes,
    more=st.integers(1, 3000),
    ratio=ratios,
    overhead=st.floats(0, 1e-2),
    stitch=st.floats(1e3, 1e12),
)
def test_more_tokens_never_take_less(tokens, more, ratio, overhead, stitch) -> None:
    row = 2 * SHAPE.layer_parameters / RATE
    layer = Curve((1.0, 2.0), (overhead + row, overhead + 2 * row))
    planner = Planner(SHAPE, machine(layer, RATE, stitch_bytes=stitch))
    few, many = (
        planner.plan(n, documents=1, prompt=9, ratios=[ratio]) for n in (tokens, tokens + more)
    )
    assert few.prefill < many.prefill
    assert few.forecasts[0].hot <= many.forecasts[0].hot
    assert few.kv_bytes < many.kv_bytes


@given(tokens=st.integers(50, 5000), low=ratios, high=ratios, speedup=st.floats(1, 20))
def test_more_rows_never_take_less_and_the_choice_keeps_its_word(
    tokens, low, high, speedup
) -> None:
    planner = Planner(SHAPE, ideal(SHAPE, RATE))
    plan = planner.plan(tokens, documents=5, prompt=9, ratios=[low, high], speedup=speedup)
    scored = [each for each in plan.forecasts if each.ratio not in (0, 1)]
    assert [each.hot for each in scored] == sorted(each.hot for each in scored)
    assert [each.ratio for each in plan.forecasts] == sorted({low, high})
    hot = {each.ratio: each.hot for each in plan.forecasts}
    enough = {ratio for ratio, seconds in hot.items() if seconds * speedup <= plan.prefill}
    if enough:
        assert plan.ratio == max(enough)
    elif min(hot.values()) < plan.prefill:
        assert plan.ratio is not None
        assert hot[plan.ratio] == min(hot.values())
    else:
        assert plan.ratio is None


def test_the_largest_ratio_that_is_soon_enough_is_recommended() -> None:
    planner = Planner(SHAPE, ROWS_COST)
    assert planner.plan(4000, documents=8, prompt=20).ratio == 0.3
    assert planner.plan(4000, documents=8, prompt=20, speedup=4).ratio == 0.15
    hurried = planner.plan(4000, documents=8, prompt=20, speedup=100)
    assert hurried.ratio == 0.05
    assert "none is 100× faster" in hurried.reason


def test_plain_prefill_is_recommended_where_passes_cost_more_than_rows() -> None:
    plan = Planner(SHAPE, PASSES_COST).plan(100, documents=4, prompt=20)
    assert plan.ratio is None
    assert "full prefill" in plan.reason


def doubt(rates: Rates, tokens: int = 4000) -> str | None:
    return Planner(SHAPE, rates).plan(tokens, documents=8, prompt=20).doubt


@pytest.mark.filterwarnings("ignore::ifkv.errors.CalibrationWarning")
def test_what_contradicts_the_count_of_operations_is_in_doubt() -> None:
    sound = ideal(SHAPE, RATE)
    assert doubt(sound) is None
    later = doubt(dataclasses.replace(sound, rows_attention=flat(RATE / 50)))
    assert later is not None
    assert "--recalibrate" in later
    assert "r = 0.05 is predicted to take" in later
    faster = doubt(dataclasses.replace(sound, prefill_attention=flat(RATE / 50)))
    assert faster is not None
    assert "times the operations" in faster
    apart = doubt(dataclasses.replace(sound, disagreement=1.6))
    assert apart is not None
    assert "differ by a factor of 1.6, where 1.5 is the most" in apart
    assert doubt(dataclasses.replace(sound, disagreement=1.4)) is None


def test_what_a_pass_costs_whatever_its_rows_and_stitching_are_no_contradiction() -> None:
    assert Planner(SHAPE, PASSES_COST).plan(100, documents=4, prompt=20).doubt is None
    slow = dataclasses.replace(ideal(SHAPE, RATE), stitch_bytes=1.0)
    assert Planner(SHAPE, slow).plan(100, documents=4, prompt=20).doubt is None


@given(tokens=sizes, documents=st.integers(1, 20), prompt=st.integers(1, 80), ratio=ratios)
def test_nothing_is_in_doubt_where_all_operations_take_their_time(
    tokens, documents, prompt, ratio
) -> None:
    plan = Planner(SHAPE, ideal(SHAPE, RATE)).plan(
        tokens, documents=min(documents, tokens), prompt=prompt, ratios=[ratio]
    )
    assert plan.doubt is None


def test_a_planner_warns_of_doubtful_rates_once() -> None:
    planner = Planner(SHAPE, dataclasses.replace(ROWS_COST, disagreement=3.0))
    with pytest.warns(CalibrationWarning, match="differ by a factor of 3.0") as warned:
        plans = [planner.plan(n, documents=8, prompt=20) for n in (100, 200, 100)]
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert all(plan.doubt for plan in plans)


def test_one_document_has_nothing_to_recompute() -> None:
    plan = Planner(SHAPE, ROWS_COST).plan(100, documents=1, prompt=5)
    assert [each.rows for each in plan.forecasts] == [0, 0, 0]


def test_behind_a_surrogate_context_the_first_document_counts_too() -> None:
    planner = Planner(SHAPE, ROWS_COST)
    for documents in (1, 4):
        options: Any = {"documents": documents, "prompt": 5, "ratios": [0.15, 1.0]}
        alone = planner.plan(1000, **options)
        behind = planner.plan(1000, first_exact=False, **options)
        assert [each.rows for each in behind.forecasts] == [150, 1000]
        assert alone.forecasts[1].rows == 1000 - 1000 // documents
        assert alone.forecasts[1].hot < behind.forecasts[1].hot
        assert alone.kv_bytes == behind.kv_bytes
        assert alone.prefill == behind.prefill


def test_loading_comes_on_top() -> None:
    rates = dataclasses.replace(ROWS_COST, warm_bytes=2e6, cold_bytes=1e6, open_document=0.5)
    plan = Planner(SHAPE, rates).plan(1000, documents=4, prompt=5)
    for each in plan.forecasts:
        assert each.warm == pytest.approx(each.hot + plan.kv_bytes / 2e6 + 2)
        assert each.cold == pytest.approx(each.hot + plan.kv_bytes / 1e6 + 2)
    unknown = Planner(SHAPE, ROWS_COST).plan(1000, documents=4, prompt=5)
    assert {(each.warm, each.cold) for each in unknown.forecasts} == {(None, None)}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": True}, "tokens is True"),
        ({"documents": 0}, "documents is 0"),
        ({"documents": 101}, "101 documents cannot be made of 100 tokens"),
        ({"prompt": -1}, "prompt is -1"),
        ({"tokens": 600}, "512 positions"),
        ({"ratios": []}, "no ratios"),
        ({"ratios": [0.1, 1.5]}, "ratio is 1.5"),
        ({"ratios": [float("nan")]}, "ratio is nan"),
        ({"speedup": 0}, "speedup is 0"),
        ({"speedup": float("nan")}, "speedup is nan"),
        ({"question": 0}, "question is 0"),
        ({"selector": "sink-aware:layers=99"}, "99"),
        ({"selector": "epic"}, "with selector='epic': .* not predicted"),
        ({"selector": "attention-norm:geometry=hl-hp"}, "not predicted"),
    ],
)
def test_bad_requests_are_refused(changed, words) -> None:
    planner = Planner(SHAPE, ROWS_COST, positions=512)
    with pytest.raises(InvalidInputError, match=words):
        planner.plan(**{"tokens": 100, "documents": 4, "prompt": 5, **changed})


def test_a_config_has_the_model_s_shape() -> None:
    model = tiny_model("phi3")
    assert shape_of_config(model.config, torch.float32) == ModelShape.of(
        tiny_model("phi3", dtype=torch.float32)
    )
    with pytest.raises(UnsupportedModelError, match="'gpt2'"):
        shape_of_config(AutoConfig.for_model("gpt2", n_layer=1), torch.float32)
    with pytest.raises(InvalidInputError, match="'vit'"):
        shape_of_config(AutoConfig.for_model("vit"), torch.float32)


def test_models_and_configs_are_calibrated_alike(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    measured = []

    def measure(config, shape, **options):
        measured.append(options["dtype"])
        return ROWS_COST

    monkeypatch.setenv("IFKV_CACHE", str(tmp_path))
    monkeypatch.setattr(kept, "measure", measure)
    model = tiny_model("llama", dtype=torch.bfloat16)
    with pytest.warns(ifkv.errors.CalibrationWarning, match="once"):
        planner = planner_for(model)
    assert planner.positions == model.config.max_position_embeddings
    assert planner_for(model.config, dtype=torch.bfloat16).rates == ROWS_COST
    assert measured == [torch.bfloat16]
    with pytest.warns(ifkv.errors.CalibrationWarning):
        planner_for(model.config)
    assert measured == [torch.bfloat16, torch.float32]
