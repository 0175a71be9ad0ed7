"""Pairs that costs count, against dense masks of the rule that the backends follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ifkv.backends.spec import AttentionSpec
from ifkv.cost import (
    ModelShape,
    causal_pairs,
    documents_cost,
    mean_position,
    prefill_cost,
    query_pairs,
    recompute_cost,
    scoring_cost,
    slot_pairs,
    speedup_bound,
    spread_pairs,
)
from ifkv.models.decoder import DecoderView
from ifkv.testing import tiny_model

WINDOWS = (None, 1, 3, 7, 20, 1000)
LENGTHS = ((0, 1), (0, 30), (5, 4), (19, 9), (20, 1), (40, 12))


def dense(rows: Tensor, keys: Tensor, window: int | None) -> int:
    """Count the pairs of a row and a key that a mask shows."""
    return int(AttentionSpec(1.0, window).visible(rows[:, None], keys).sum())


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("context", "rows"), LENGTHS)
def test_rows_behind_a_context(context: int, rows: int, window: int | None) -> None:
    slots = torch.arange(context + rows)
    asked = slots[context:]
    assert causal_pairs(context, rows, window) == dense(asked, slots, window)
    assert query_pairs(context, rows, window) == dense(asked, slots[:context], window)


@pytest.mark.parametrize("window", WINDOWS)
def test_scattered_rows(window: int | None) -> None:
    slots = torch.arange(60)
    rows = torch.tensor([0, 2, 3, 6, 7, 19, 20, 58])
    assert slot_pairs(rows, window) == dense(rows, slots, window)
    assert slot_pairs(rows[:0], window) == 0


@pytest.mark.parametrize("window", [None, 1, 50, 400, 5000])
@pytest.mark.parametrize(("start", "stop"), [(0, 1000), (250, 1000), (0, 600)])
def test_rows_spread_evenly(start: int, stop: int, window: int | None) -> None:
    rows, slots = torch.arange(start, stop, 3), torch.arange(1000)
    estimated = spread_pairs(len(rows), 1000, mean_position(rows, 1000), window)
    assert estimated == pytest.approx(dense(rows, slots, window), rel=0.01)
    assert spread_pairs(0, 1000, 0.5, window) == 0


@pytest.mark.parametrize(
    ("family", "expected"),
    [("llama", ()), ("mistral", (4, 4, 4)), ("phi3", (4, 4, 4)), ("qwen3", (None, 4, 4))],
)
def test_windows_are_those_of_the_layers(family: str, expected: tuple[int | None, ...]) -> None:
    options: dict[str, Any] = {"sliding_window": 4} if expected else {}
    model = tiny_model(family, **options)
    assert ModelShape.of(model).windows == expected
    assert DecoderView(model).windows == (expected or (None,) * 3)
    assert ModelShape.of_config(model.config, model.dtype) == ModelShape.of(model)


def test_a_window_takes_off_what_it_hides_in_its_own_layers() -> None:
    """Attention's operations are four a pair and dimension of the query heads."""
    sizes: dict[str, Any] = {"attention_width": 1, "attention_parameters": 0, "layer_parameters": 0}
    windows = (None, 6, 3)
    shape = ModelShape(num_layers=3, windows=windows, **sizes)
    slots, rows = torch.arange(40), torch.tensor([4, 5, 17, 29])
    context, prompt = slots[:30], slots[30:]

    full = sum(dense(slots, slots, window) for window in windows)
    assert prefill_cost(shape, 40).flops == 4 * full
    document = slots[10:]
    alone = sum(dense(document, slots, window) for window in windows[:-1])
    assert documents_cost(shape, [30], 10).flops == 4 * alone
    both = torch.cat((rows, prompt))
    recomputed = sum(dense(both, slots, window) for window in windows[:-1])
    recomputed += dense(slots[-1:], slots, windows[-1])
    assert recompute_cost(shape, rows, 30, 10).flops == 4 * recomputed
    scored = sum(dense(prompt, slots, window) for window in windows)
    normed = sum(dense(prompt, context, window) for window in windows[1:])
    assert scoring_cost(shape, 10, 30, [1, 2]).flops == 4 * scored + 2 * normed


def test_bound_counts_what_windows_leave() -> None:
    parameters, width, context, query = 1000, 64, 3000, 30
    windows = (None, 500, 500, 4000)
    rows = torch.arange(1000, context, 5)
    shape = ModelShape(parameters, width, len(windows), windows=windows)

    def operations(count: int, pairs: float) -> float:
        return 2 * parameters * count * len(windows) + 4 * width * pairs

    every, slots = torch.arange(context), torch.arange(context)
    full = operations(context, sum(dense(every, slots, window) for window in windows))
    repaired = operations(len(rows), sum(dense(rows, slots, window) for window in windows))
    asked = query * operations(1, sum(dense(every[-1:], slots, window) for window in windows))
    bound = speedup_bound(
        shape,
        context_length=context,
        query_length=query,
        ratio=len(rows) / context,
        position=mean_position(rows, context),
    )
    assert bound == pytest.approx(full / (repaired + asked), rel=2e-3)
