"""The bound on speed, against operations counted one by one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from ifkv.cost import (
    ModelShape,
    decode_cost,
    documents_cost,
    mean_position,
    speedup_bound,
    spread_pairs,
    stitch_cost,
)
from ifkv.testing import tiny_model


def test_bound_is_the_ratio_of_counted_operations() -> None:
    # Sizes of Qwen3-8B; the numbers of operations are added up row by row.
    hidden, heads, kv_heads, head_dim, mlp, layers = 4096, 32, 8, 128, 12288, 36
    parameters = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim + 3 * hidden * mlp
    width = heads * head_dim
    context, query, scoring = 2048, 64, 26
    selected = range(3, context, 7)

    def row(position: float) -> float:
        return 2 * parameters + 4 * position * width

    full = sum(row(position + 0.5) for position in range(context))
    rows = sum(row(slot + 0.5) for slot in selected)
    asked = query * row(context) * (1 + scoring / layers)
    counted = full / (rows + asked)
    bound = speedup_bound(
        ModelShape(parameters, width, layers),
        context_length=context,
        query_length=query,
        ratio=len(selected) / context,
        scoring_layers=scoring,
        position=mean_position(torch.tensor(list(selected)), context),
    )
    assert bound == pytest.approx(counted, rel=2e-3)


def test_late_rows_cost_more() -> None:
    shape = ModelShape(1000, 64, 4)
    common = {"context_length": 4096, "query_length": 1, "ratio": 0.1, "scoring_layers": 2}
    early = speedup_bound(shape, position=0.2, **common)
    late = speedup_bound(shape, position=0.9, **common)
    assert late < early


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_shape_is_read_from_the_weights(family: str) -> None:
    model = tiny_model(family, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2)
    shape = ModelShape.of(model)
    width, kv_width = 4 * 8, 2 * 8
    assert shape.layer_parameters == 2 * 32 * width + 2 * 32 * kv_width + 3 * 32 * 48
    assert shape.attention_width == width
    assert shape.num_layers == 3


def test_no_rows_lie_in_the_middle() -> None:
    assert mean_position(torch.zeros(0, dtype=torch.long), 10) == 0.5


def test_a_model_without_weights_has_a_shape() -> None:
    model = tiny_model("qwen3", head_dim=16)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    assert ModelShape.of(empty) == ModelShape.of(model)


def test_documents_are_causal_rows_behind_their_prefix() -> None:
    shape = ModelShape.of(tiny_model("llama"))
    together = documents_cost(shape, [5, 7], 3)
    apart = documents_cost(shape, [5], 3) + documents_cost(shape, [7], 3)
    assert together.flops == apart.flops
    assert together.bytes < apart.bytes  # weights and prefix are read once


def test_stitching_moves_what_a_store_holds_twice() -> None:
    shape = ModelShape.of(tiny_model("llama"))
    assert stitch_cost(shape, 100).bytes == 2 * 100 * shape.token_bytes
    elements = 2 * shape.num_layers * shape.kv_heads * shape.head_dim
    assert shape.token_bytes == elements * 8  # tiny models are float64


def test_decoding_is_recomputing_one_row_at_the_end() -> None:
    shape = ModelShape.of(tiny_model("llama"))
    one = shape.layer(1, 50, 50)
    assert decode_cost(shape, 50).flops == (shape.num_layers * one + shape.head()).flops
    assert shape.head().flops == 2 * shape.vocabulary * shape.hidden_size


def test_spread_rows_have_as_many_pairs_as_their_slots_say() -> None:
    slots = torch.arange(3, 1000, 7)
    exact = float((slots + 1).sum())
    assert spread_pairs(len(slots), 1000, mean_position(slots, 1000)) == pytest.approx(exact)


@pytest.mark.parametrize(("family", "dense"), [("qwen3_moe", 0), ("dots1", 1)])
def test_a_row_uses_some_experts_and_many_rows_read_all(family: str, dense: int) -> None:
    model = tiny_model(family, num_layers=2)
    shape = ModelShape.of(model)
    layers = list(model.base_model.layers)
    matrices = [sum(p.numel() for p in each.parameters() if p.ndim > 1) for each in layers]
    one = sum(p.numel() for p in layers[1].parameters() if p.ndim == 3) // 4
    with_experts = len(layers) - dense
    assert shape.held_parameters == sum(matrices) // 2
    assert shape.layer_parameters == (sum(matrices) - 2 * one * with_experts) // 2
    assert (shape.experts, shape.experts_used) == (4, 2)
    read = [shape.layer(rows, 0, 0).bytes for rows in (1, 2, 50)]
    assert read[1] - read[0] == 2 * shape.expert_parameters * shape.element_size
    assert read[1] == read[2]
    assert shape.layer(50, 0, 0).flops == 50 * shape.layer(1, 0, 0).flops
