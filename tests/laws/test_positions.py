"""A slot is not a position: documents that take more positions than they have tokens.

The truth is the model's own forward, which is given the positions. Nothing of ifkv may take a slot
for a position, or the keys and queries it rotates would not be upstream's.
"""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import ifkv
from ifkv.errors import InvalidInputError
from ifkv.models.compat import cache_keyword
from ifkv.selectors import Budget, Request, resolve
from ifkv.store import MemoryStore
from ifkv.testing import assert_close, shared_tiny_model
from ifkv.testing.strategies import token_ids
from tried import FAMILIES

EXACT = 1e-11
PREFIX, PROMPT = [1, 7, 9], [30, 31, 32, 33]
DOCUMENTS = [[5, 6, 7, 8], [11, 12], [13, 14, 15, 16, 17]]
EXTENTS = [9, 2, 11]


def spread(model, extents=EXTENTS, documents=DOCUMENTS):
    """Documents that take these many positions."""
    made = ifkv.prefill_documents(model, documents, prefix=PREFIX)
    return [dataclasses.replace(d, extent=e) for d, e in zip(made, extents, strict=True)]


def places(extents=EXTENTS, documents=DOCUMENTS, behind=4) -> list[int]:
    """Positions of prefix, documents and what follows, from the definition."""
    found, start = list(range(len(PREFIX))), len(PREFIX)
    for document, extent in zip(documents, extents, strict=True):
        found += range(start, start + len(document))
        start += extent
    return found + list(range(start, start + behind))


def upstream(model, token_ids, positions) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits, keys and values of the model's own forward at these positions."""
    cache, ids = DynamicCache(), torch.tensor([token_ids])
    with torch.no_grad():
        out = model(
            ids,
            position_ids=torch.tensor([positions]),
            attention_mask=torch.ones_like(ids),
            use_cache=True,
            **cache_keyword(model, cache),
        )
    layers = cache.layers
    return out.logits[0], [layer.keys for layer in layers], [layer.values for layer in layers]


def context_ids(documents=DOCUMENTS) -> list[int]:
    return PREFIX + [token for document in documents for token in document]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [None, 3])
def test_everything_recomputed_equals_the_models_own_forward_at_those_positions(family, block):
    model = shared_tiny_model(family, dtype=torch.float64)
    logits, keys, values = upstream(model, context_ids() + PROMPT, places())
    with ifkv.patch(model):
        cache = ifkv.stitch(model, spread(model))
        assert cache.positions.tolist() == places(behind=0)
        slots = cache.candidate_slots
        got = ifkv.recompute(model, cache, slots, prompt_ids=PROMPT, block_tokens=block)
    assert_close(got, logits[-1], what="logits", tolerance=EXACT)
    for layer, k, v in zip(cache.layers, keys, values, strict=True):
        assert_close(layer.keys, k, what="keys", tolerance=EXACT)
        assert_close(layer.values, v, what="values", tolerance=EXACT)


@given(
    documents=st.lists(token_ids(min_size=1, max_size=5), min_size=1, max_size=4),
    gaps=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    data=st.data(),
)
def test_any_gaps_and_any_depth_of_some_slots(documents, gaps, data):
    """Rows that stop half-way leave deeper layers as they were: layer by layer, in two passes."""
    model = shared_tiny_model("qwen3", dtype=torch.float64, num_layers=3)
    extents = [len(own) + gap for own, gap in zip(documents, gaps, strict=False)]
    positions = places(extents, documents)
    logits, _, _ = upstream(model, context_ids(documents) + PROMPT, positions)
    with ifkv.patch(model):
        cache = ifkv.stitch(model, spread(model, extents, documents))
        slots = cache.candidate_slots.tolist()
        depths = [data.draw(st.integers(0, 3)) for _ in slots]
        ifkv.recompute(model, cache, slots, depths=depths)  # of no use but to disturb
        got = ifkv.recompute(model, cache, slots, prompt_ids=PROMPT, depths=[3] * len(slots))
    assert_close(got, logits[-1], what="logits", tolerance=EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_go_on_behind_the_gaps(family):
    """Alone through generate() and side by side: upstream's own greedy tokens."""
    model = shared_tiny_model(family, dtype=torch.float64)
    want, ids, positions = [], context_ids() + PROMPT, places()
    for _ in range(5):
        logits, _, _ = upstream(model, ids, positions)
        want.append(int(logits[-1].argmax()))
        ids, positions = [*ids, want[-1]], [*positions, positions[-1] + 1]
    with ifkv.patch(model):
        alone, other = (ifkv.stitch(model, spread(model)) for _ in range(2))
        plain = ifkv.stitch(model, ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX))
        for cache in (alone, other):
            ifkv.recompute(model, cache, cache.candidate_slots)
        said = ifkv.generate(model, alone, PROMPT, max_new_tokens=5, eos_token_id=-1)
        many = ifkv.generate_many(
            model, [plain, other], [PROMPT, PROMPT], max_new_tokens=5, eos_token_id=[-1]
        )
    assert said[0, len(PROMPT) :].tolist() == want
    assert many[1].tolist() == want


def test_documents_added_later_stand_behind_the_gaps():
    model = shared_tiny_model("llama", dtype=torch.float64)
    with ifkv.patch(model):
        made = spread(model)
        whole = ifkv.stitch(model, made)
        grown = ifkv.stitch(model, made[:1])
        slots = ifkv.extend(model, grown, made[1:])
        assert grown.positions.tolist() == whole.positions.tolist()
        assert grown.query_position == whole.query_position
        for one, other in zip(grown.layers, whole.layers, strict=True):
            assert torch.equal(one.keys, other.keys)
        got = ifkv.recompute(model, grown, slots, prompt_ids=PROMPT)
        grown.keep(PROMPT)
    logits, _, _ = upstream(model, context_ids() + PROMPT, places())
    assert_close(got, logits[-1], what="logits", tolerance=EXACT)
    assert grown.positions.tolist() == places()
    assert grown.query_position == places(behind=5)[-1]


def test_cacheblend_compares_rows_at_their_positions():
    model = shared_tiny_model("llama", dtype=torch.float64)
    _, keys, values = upstream(model, context_ids(), places(behind=0))
    with ifkv.patch(model):
        cache = ifkv.stitch(model, spread(model))
        for deviation, truth in (("v", values), ("k", keys)):
            rule = resolve(f"cacheblend:deviation={deviation}")
            found = rule.select(model, cache, Request(PROMPT, PROMPT, None, None), Budget(0.3))
            layer = cache.layers[1]
            held = layer.values if deviation == "v" else layer.keys
            want = (truth[1] - held).float().square().mean(dim=(0, 1, 3))
            want[: len(PREFIX) + len(DOCUMENTS[0])] = 0
            assert_close(found.scores, want, what=deviation, tolerance=1e-6)


def test_queries_stand_behind_the_gaps():
    """Scores differ from those without gaps, and equal upstream's attention at the positions."""
    model = shared_tiny_model("llama", dtype=torch.float64)
    with ifkv.patch(model):
        cache = ifkv.stitch(model, spread(model))
        ifkv.recompute(model, cache, cache.candidate_slots)
        got = ifkv.score(model, cache, PROMPT, layers=[1])
    ids = torch.tensor([context_ids() + PROMPT])
    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(
                ids,
                position_ids=torch.tensor([places()]),
                attention_mask=torch.ones_like(ids),
                output_attentions=True,
                use_cache=True,
            )
    finally:
        model.set_attn_implementation(previous)
    total = len(context_ids())
    mean = out.attentions[1][0].mean(0)[total:, :total]
    assert_close(got, mean.norm(dim=0).float(), what="norms", tolerance=1e-6)


def test_positions_count_for_the_models_limit_and_overlaps_are_refused():
    model = shared_tiny_model("llama", dtype=torch.float64)
    with ifkv.patch(model):
        [document] = ifkv.prefill_documents(model, [[5, 6, 7]], prefix=PREFIX)
        limit = model.config.max_position_embeddings
        far = dataclasses.replace(document, extent=limit)
        with pytest.raises(InvalidInputError, match="the stitched context"):
            ifkv.stitch(model, [far])
        fits = ifkv.stitch(model, [dataclasses.replace(document, extent=limit - len(PREFIX) - 1)])
        with pytest.raises(InvalidInputError, match="context and prompt"):
            ifkv.recompute(model, fits, [], prompt_ids=[20, 21])
        with pytest.raises(InvalidInputError, match="positions would overlap"):
            ifkv.stitch(model, [dataclasses.replace(document, extent=2)])
        with pytest.raises(InvalidInputError, match="no store can hold yet"):
            MemoryStore().put(dataclasses.replace(document, extent=9))


def test_positions_may_have_several_axes():
    """Rows behind the context go on alike on all axes."""
    model = shared_tiny_model("llama", dtype=torch.float64)
    with ifkv.patch(model):
        cache = ifkv.stitch(model, spread(model))
    one = cache.positions
    cache.positions = torch.stack((one, 2 * one, 3 * one))
    got = cache.positions_at(torch.tensor([3, 7, len(one), len(one) + 1]))
    assert got.tolist() == [[3, 12, 25, 26], [6, 24, 25, 26], [9, 36, 25, 26]]
    assert cache.positions_with(2).shape == (3, 1, len(one) + 2)
    cache.add_tokens([40, 41])
    assert cache.positions[:, -2:].tolist() == [[25, 26]] * 3
