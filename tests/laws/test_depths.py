"""Rows that are recomputed in the first layers only: nested sets of slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

import ifkv
from ifkv import selectors
from ifkv.cost import ModelShape, recompute_cost
from ifkv.errors import InvalidInputError
from ifkv.selectors import Cost, Request, Selection
from ifkv.steps.select import budget
from ifkv.testing import assert_bit_equal, assert_close, dense_stitched, shared_tiny_model
from ifkv.testing.dense import _queries_keys_values, _rotate, _window
from ifkv.testing.dense_mlp import feed_forward
from ifkv.testing.dense_norms import linear, norm
from scenario import EXACT, Scenario, keys_of, prepared, scenarios, values_of
from selecting import TOKENS

LAYERS = 3


def by_depth(
    model: Any, s: Scenario, slots: Sequence[int], depths: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer by layer from the formulas: keys, values `[L, H_kv, N, D]` and the last row's logits.

    All rows are carried to the end; those that have stopped are just not written.
    """
    context = dense_stitched(model, s.request.prefix, s.request.documents, s.order)
    total, prompt = len(context.token_ids), s.request.prompt
    rows = torch.tensor([*slots, *range(total, total + len(prompt))])
    reach = torch.tensor([*depths, *([LAYERS] * len(prompt))])
    ids = torch.cat([context.token_ids[list(slots)], torch.tensor(prompt)])
    positions = torch.arange(total + len(prompt))
    hidden = model.model.embed_tokens.weight[ids]
    all_keys, all_values = [], []
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        q, k_new, v_new = _queries_keys_values(attention, norm(layer.input_layernorm, hidden))
        k = _rotate(model, pad(context.keys_before_rope[index], (0, 0, 0, len(prompt))), positions)
        v = pad(context.values[index], (0, 0, 0, len(prompt)))
        writes = reach > index
        k[:, rows[writes]] = _rotate(model, k_new, rows)[:, writes]
        v[:, rows[writes]] = v_new[:, writes]
        visible = positions[None] <= rows[:, None]
        if (window := _window(attention)) is not None:
            visible = visible & (positions[None] > rows[:, None] - window)
        group = q.shape[0] // k.shape[0]
        scores = _rotate(model, q, rows) @ k.repeat_interleave(group, 0).transpose(1, 2)
        scores = (scores * attention.scaling).masked_fill(~visible, float("-inf"))
        mixed = scores.softmax(-1) @ v.repeat_interleave(group, 0)
        hidden = hidden + linear(attention.o_proj, mixed.transpose(0, 1).flatten(1))
        hidden = hidden + feed_forward(
            model.config, layer.mlp, norm(layer.post_attention_layernorm, hidden)
        )
        all_keys.append(k)
        all_values.append(v)
    logits = linear(model.lm_head, norm(model.model.norm, hidden))[-1]
    return torch.stack(all_keys), torch.stack(all_values), logits


@given(s=scenarios(), block=st.none() | st.integers(1, 5), data=st.data())
def test_depths_equal_a_slow_dense_version(
    s: Scenario, block: int | None, data: st.DataObject
) -> None:
    slots = data.draw(st.permutations(s.slots), label="slots")
    depths = [data.draw(st.integers(0, LAYERS), label="depth") for _ in slots]
    with torch.no_grad():
        keys, values, expected = by_depth(s.model, s, slots, depths)
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        before = cache.clone()
        logits = ifkv.recompute(
            s.model, cache, slots, depths=depths, block_tokens=block, prompt_ids=s.request.prompt
        )
    assert_close(keys_of(cache), keys, what="keys", tolerance=EXACT)
    assert_close(values_of(cache), values, what="values", tolerance=EXACT)
    assert_close(logits, expected, what="logits", tolerance=EXACT)
    reached = dict(zip(slots, depths, strict=True))
    for index, (layer, old) in enumerate(zip(cache.layers, before.layers, strict=True)):
        stale = [slot for slot in range(s.total) if reached.get(slot, 0) <= index]
        assert_bit_equal(layer.keys[:, :, stale], old.keys[:, :, stale], what="stale keys")
        assert_bit_equal(layer.values[:, :, stale], old.values[:, :, stale], what="stale values")


@given(s=scenarios())
def test_all_layers_is_a_plain_recompute(s: Scenario) -> None:
    with prepared(s.model, s.request) as bench:
        plain, deep = bench.stitch(), bench.stitch()
        ifkv.recompute(s.model, plain, s.slots)
        assert ifkv.recompute(s.model, deep, s.slots, depths=[LAYERS] * len(s.slots)) is None
    assert_close(keys_of(deep), keys_of(plain), what="keys", tolerance=EXACT)
    assert_close(values_of(deep), values_of(plain), what="values", tolerance=EXACT)


@pytest.mark.parametrize(
    ("depths", "message"),
    [([1], "1 depths for 2 slots"), ([1, 4], "0 to 3"), ([-1, 1], "0 to 3"), ([1, 0.5], "whole")],
)
def test_bad_depths_are_refused(depths: Any, message: str) -> None:
    model = shared_tiny_model("llama")
    with prepared(model, TOKENS) as bench:
        cache = bench.stitch()
        before = cache.clone()
        with pytest.raises(InvalidInputError, match=message):
            ifkv.recompute(model, cache, [5, 6], depths=depths)
        assert_bit_equal(values_of(cache), values_of(before), what="values")


@given(falls=st.lists(st.floats(0, 1), min_size=LAYERS, max_size=LAYERS), seed=st.integers(0, 9))
def test_every_layer_keeps_to_its_ratio(falls: list[float], seed: int) -> None:
    """And takes the highest scores: each layer's set is what its own ratio would select."""
    ratios = sorted(falls, reverse=True)
    model = shared_tiny_model("llama")
    rule = selectors.Random(seed=seed)
    with prepared(model, TOKENS) as bench:
        cache = bench.stitch()
        request = Request([1], [1])
        selection = rule.select(model, cache, request, ratios[0])
        if selection.scores is None:
            return
        depths = selectors.layer_depths(cache, selection, ratios)
        for layer, ratio in enumerate(ratios):
            kept = selection.slots[depths > layer]
            assert torch.equal(kept, rule.select(model, cache, request, ratio).slots)
            assert len(kept) == min(budget(cache.context_length, ratio), len(selection.slots))


def test_a_ratio_counts_the_slots_that_may_be_chosen() -> None:
    with prepared(shared_tiny_model("llama"), TOKENS) as bench:
        cache = bench.stitch()
    view = cache.choosing(torch.tensor([5, 6, 9, 12]))
    selection = Selection(torch.tensor([5, 6, 9]), torch.arange(16.0), Cost())
    depths = selectors.layer_depths(view, selection, [0.75, 0.5, 0.25])
    assert depths.tolist() == [1, 2, 3]


def test_ratios_that_cannot_be_are_refused() -> None:
    with prepared(shared_tiny_model("llama"), TOKENS) as bench:
        cache = bench.stitch()
    slots = torch.tensor([5, 6])
    scored = Selection(slots, torch.zeros(16), Cost())
    for ratios, message in [([0.1], "1 ratios"), ([0.1, 0.2, 0.1], "grow"), ([2, 1, 1], "ratio")]:
        with pytest.raises(InvalidInputError, match=message):
            selectors.layer_depths(cache, scored, ratios)
    with pytest.raises(InvalidInputError, match="no scores"):
        selectors.layer_depths(cache, Selection(slots, None, Cost()), [0.1] * 3)


def test_shallow_rows_cost_less() -> None:
    shape = ModelShape.of(shared_tiny_model("llama"))
    slots = torch.tensor([5, 9, 12])
    costs = [
        recompute_cost(shape, slots, 16, 4, depths=torch.full((3,), depth)).flops
        for depth in range(LAYERS + 1)
    ]
    assert costs == sorted(set(costs))
    assert costs[0] == recompute_cost(shape, slots[:0], 16, 4).flops
    assert costs[LAYERS] == recompute_cost(shape, slots, 16, 4).flops
