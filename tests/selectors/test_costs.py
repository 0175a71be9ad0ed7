"""What selectors say they cost is what torch runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

import ifkv
from counting import operations
from ifkv.backends import tiles
from ifkv.cost import ModelShape, prefill_cost, recompute_cost
from ifkv.selectors import Cost
from ifkv.testing import shared_tiny_model, tiny_model
from ifkv.testing.strategies import Request as Tokens
from scenario import prepared
from selecting import SPECS, TOKENS, chosen


def counted(run: Callable[[], Any]) -> float:
    """Operations that torch runs with one row a tile: none computes pairs only to mask them."""
    with patch.object(tiles, "TILE_ROWS", 1):
        return operations(run)


COUNTED = [s for s in SPECS if s not in ("epic", "random", "recency")]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("spec", COUNTED)
def test_flops_are_those_that_torch_runs(spec: str, family: str) -> None:
    model = shared_tiny_model(family, num_layers=4)
    request = Tokens([1], [[5] * 20, [8] * 130, [3] * 90, [13] * 60], [20] * 5, [19] * 9)
    with prepared(model, request) as bench:
        cache = bench.stitch()
        chosen(spec, bench, cache, 0.2)  # what is learnt once a document counts to no request
        spent: list[Cost] = []
        total = counted(lambda: spent.append(chosen(spec, bench, cache, 0.2).cost))
    assert spent[0].flops == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_recompute_and_prefill_cost_what_torch_runs(family: str) -> None:
    model = shared_tiny_model(family, num_layers=4)
    shape = ModelShape.of(model)
    head = 2 * model.get_output_embeddings().weight.numel()
    request = Tokens([1], [[5] * 20, [8] * 130, [3] * 90], [20] * 5, [19] * 9)
    with prepared(model, request) as bench:
        cache = bench.stitch()
        slots = torch.arange(21, 241, 3)
        total = counted(lambda: ifkv.recompute(model, cache, slots, prompt_ids=request.prompt))
        expected = recompute_cost(shape, slots, 241, 9).flops + head
        assert expected == pytest.approx(total, rel=0.01)
        blank = bench.stitch()
        total = counted(lambda: ifkv.recompute(model, blank, slots))
        assert recompute_cost(shape, slots, 241).flops == pytest.approx(total, rel=0.01)
    ids = torch.tensor([[1] * 240])
    with torch.no_grad():
        total = counted(lambda: model(ids, logits_to_keep=1))
    assert prefill_cost(shape, 240).flops + head == pytest.approx(total, rel=0.01)


def test_bytes_are_those_of_the_tensors() -> None:
    model = tiny_model("qwen2", dtype=torch.float32)
    shape = ModelShape.of(model)
    base: Any = model.base_model
    weights = sum(p.nbytes for layer in base.layers for p in layer.parameters() if p.ndim == 2)
    with prepared(model, TOKENS) as bench:
        cache = bench.stitch()
        rows = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    # All is read and written once.
    assert prefill_cost(shape, cache.context_length).bytes == weights + 2 * rows
    assert recompute_cost(shape, torch.zeros(0, dtype=torch.long), 9) == Cost()


def test_costs_add_up() -> None:
    with prepared(shared_tiny_model("llama"), TOKENS) as bench:
        cache = bench.stitch()
        cost = {
            spec: chosen(spec, bench, cache, 0.5).cost
            for spec in ("attention-norm", "attention-norm:query=both", "two-round", "random")
        }
    assert cost["random"] == Cost()
    assert cost["attention-norm"].flops < cost["attention-norm:query=both"].flops
    assert cost["two-round"].flops > 2 * cost["attention-norm"].flops
    assert cost["two-round"].bytes > 2 * cost["attention-norm"].bytes
