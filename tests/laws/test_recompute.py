"""Laws 1-3, 6, 7 and 9-17 of the method: what recomputing repairs, reads and leaves alone."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import ifkv
from ifkv.testing import (
    assert_bit_equal,
    assert_close,
    dense_prefill,
    dense_recompute,
    dense_stitched,
    rope_types,
    shared_tiny_model,
)
from ifkv.testing.strategies import Request, slot_subsets
from scenario import (
    EXACT,
    Scenario,
    assert_rows_equal,
    cache_of,
    keys_of,
    poison,
    prepared,
    scenarios,
    values_of,
)
from tried import FAMILIES, head_width

SUPPORTED = ("default", "linear", "llama3", "yarn")
FAMILY_ROPES = [(f, r) for f in FAMILIES for r in rope_types(f) if r in SUPPORTED]
FAMILY_ROPES += [("phi3", "longrope")]


def assert_bit_equal_caches(cache: ifkv.StitchedCache, other: ifkv.StitchedCache) -> None:
    assert_bit_equal(keys_of(cache), keys_of(other), what="keys")
    assert_bit_equal(values_of(cache), values_of(other), what="values")


@given(s=scenarios())
def test_recompute_equals_the_oracle_for_any_selection(s: Scenario) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        logits = ifkv.recompute(s.model, cache, s.slots, prompt_ids=s.request.prompt)
    context = dense_stitched(s.model, s.request.prefix, s.request.documents, s.order)
    truth = dense_recompute(s.model, context, s.slots, s.request.prompt)
    assert_rows_equal(cache, truth, what="after recompute")
    assert_close(logits, truth.logits[-1], what="logits", tolerance=EXACT)


@pytest.mark.parametrize(("family", "rope"), FAMILY_ROPES)
def test_law_1_on_every_family_and_rope_type(family: str, rope: str) -> None:
    """Against the model's own forward, without the oracle between."""
    model = shared_tiny_model(
        family, rope=rope, head_dim=None if rope == "longrope" else head_width(family, 12)
    )
    request = Request([1, 2], [[5, 6, 7, 8], [9, 10], [11] * 7], [3], [12, 13, 14])
    with prepared(model, request) as bench:
        cache = bench.stitch([2, 0, 1])
        slots = range(cache.context_length)
        logits = ifkv.recompute(model, cache, slots, prompt_ids=request.prompt)
    ids = torch.cat([cache.token_ids, torch.tensor(request.prompt)])
    with torch.no_grad():
        upstream = model(ids[None])
    assert_close(logits, upstream.logits[0, -1], what="logits", tolerance=EXACT)
    for ours, theirs in zip(cache.layers, cache_of(upstream).layers, strict=True):
        assert_close(ours.keys, theirs.keys, what="keys", tolerance=EXACT)
        assert_close(ours.values, theirs.values, what="values", tolerance=EXACT)


@given(s=scenarios())
def test_law_1_everything_recomputed_equals_full_prefill(s: Scenario) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        logits = ifkv.recompute(s.model, cache, range(s.total), prompt_ids=s.request.prompt)
    full = dense_prefill(s.model, [*cache.token_ids.tolist(), *s.request.prompt])
    assert_rows_equal(cache, full, what="at ratio 1")
    assert_close(logits, full.logits[-1], what="logits", tolerance=EXACT)


@given(s=scenarios())
def test_law_2_all_but_prefix_and_first_document(s: Scenario) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        rest = range(cache.document_slices[0].stop, s.total)
        logits = ifkv.recompute(s.model, cache, rest, prompt_ids=s.request.prompt)
    full = dense_prefill(s.model, [*cache.token_ids.tolist(), *s.request.prompt])
    assert_rows_equal(cache, full, what="with all but the first document recomputed")
    assert_close(logits, full.logits[-1], what="logits", tolerance=EXACT)


@given(s=scenarios())
def test_law_3_one_document_needs_no_recompute(s: Scenario) -> None:
    alone = Request(s.request.prefix, s.request.documents[:1], s.request.query, s.request.prompt)
    with prepared(s.model, alone) as bench:
        cache = bench.stitch()
        logits = ifkv.recompute(s.model, cache, [], prompt_ids=alone.prompt)
    full = dense_prefill(s.model, [*alone.context, *alone.prompt])
    assert_rows_equal(cache, full, what="of one document")
    assert_close(logits, full.logits[-1], what="logits", tolerance=EXACT)


@given(s=scenarios(min_documents=2), data=st.data())
def test_law_6_a_run_behind_the_first_document_repairs_up_to_its_end(
    s: Scenario, data: st.DataObject
) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        start = cache.document_slices[0].stop
        end = data.draw(st.integers(start, s.total), label="end of the run")
        ifkv.recompute(s.model, cache, range(start, end))
    full = dense_prefill(s.model, cache.token_ids)
    assert_rows_equal(cache, full, what="up to the run's end", rows=slice(0, end))


@given(s=scenarios(min_documents=2))
def test_law_7_layers_0_and_1_are_exact_at_any_selection(s: Scenario) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.recomputed(s.slots, s.order)
    full = dense_prefill(s.model, cache.token_ids)
    assert_rows_equal(cache, full, what="selected", rows=s.slots, layers=slice(0, 2))


def test_law_7_layer_2_is_not_exact() -> None:
    model = shared_tiny_model("llama")
    with prepared(model, Request([1], [[2, 3, 4], [5, 6, 7]], [8], [9])) as bench:
        cache = bench.recomputed([6])
    error = (values_of(cache) - dense_prefill(model, cache.token_ids).values)[2, :, 6].abs()
    assert error.max() > 0.01


@given(s=scenarios())
def test_law_9_recompute_is_idempotent(s: Scenario) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.recomputed(s.slots, s.order)
        again = cache.clone()
        ifkv.recompute(s.model, again, s.slots)
    assert_bit_equal_caches(again, cache)


@given(s=scenarios(min_slots=1), value=st.sampled_from([1e9, float("nan")]))
def test_law_10_old_rows_at_selected_slots_are_never_read(s: Scenario, value: float) -> None:
    with prepared(s.model, s.request) as bench:
        expected = bench.recomputed(s.slots, s.order)
        cache = bench.stitch(s.order)
        poison(cache, s.slots, value)
        ifkv.recompute(s.model, cache, s.slots)
    assert_bit_equal_caches(cache, expected)


@given(s=scenarios(min_slots=1), value=st.sampled_from([1e9, float("nan")]))
def test_law_11_rows_behind_the_last_selected_one_are_never_read(s: Scenario, value: float) -> None:
    """Not even in the cache's free slots behind the context."""
    with prepared(s.model, s.request) as bench:
        expected = bench.recomputed(s.slots, s.order)
        cache = bench.stitch(s.order)
        poison(cache, slice(s.slots[-1] + 1, None), value)
        ifkv.recompute(s.model, cache, s.slots)
    seen = slice(0, s.slots[-1] + 1)
    for pick in (keys_of, values_of):
        assert_bit_equal(pick(cache)[:, :, seen], pick(expected)[:, :, seen], what="rows seen")


@given(s=scenarios())
def test_law_12_unselected_rows_are_bit_equal(s: Scenario) -> None:
    with prepared(s.model, s.request) as bench:
        before = bench.stitch(s.order)
        cache = before.clone()
        ifkv.recompute(s.model, cache, s.slots, prompt_ids=s.request.prompt)
    kept = sorted(set(range(s.total)) - set(s.slots))
    for pick in (keys_of, values_of):
        assert_bit_equal(pick(cache)[:, :, kept], pick(before)[:, :, kept], what="unselected rows")


@given(s=scenarios(), data=st.data())
def test_law_13_a_subset_first_changes_nothing(s: Scenario, data: st.DataObject) -> None:
    subset = data.draw(st.lists(st.sampled_from(s.slots), unique=True) if s.slots else st.just([]))
    with prepared(s.model, s.request) as bench:
        at_once = bench.recomputed(s.slots, s.order)
        in_two = bench.recomputed(subset, s.order)
        ifkv.recompute(s.model, in_two, s.slots)
    assert_bit_equal_caches(in_two, at_once)


@given(s=scenarios(min_slots=1), block_tokens=st.integers(1, 8), with_prompt=st.booleans())
def test_law_14_ascending_blocks_equal_the_joint_pass(
    s: Scenario, block_tokens: int, with_prompt: bool
) -> None:
    prompt = s.request.prompt if with_prompt else None
    with prepared(s.model, s.request) as bench:
        joint, blocked, by_hand = (bench.stitch(s.order) for _ in range(3))
        expected = ifkv.recompute(s.model, joint, s.slots, prompt_ids=prompt)
        logits = ifkv.recompute(
            s.model, blocked, s.slots, prompt_ids=prompt, block_tokens=block_tokens
        )
        for start in range(0, len(s.slots), block_tokens):
            ifkv.recompute(s.model, by_hand, s.slots[start : start + block_tokens])
    assert_rows_equal(blocked, joint, what="in blocks")
    rows = slice(0, s.total)
    assert_rows_equal(by_hand, joint, what="in blocks by hand", rows=rows)
    if with_prompt:
        assert_close(logits, expected, what="logits", tolerance=EXACT)
    else:
        assert logits is None


def test_law_14_descending_passes_do_not() -> None:
    model = shared_tiny_model("llama")
    with prepared(model, Request([1], [[2, 3, 4], [5, 6, 7]], [8], [9])) as bench:
        joint, descending = bench.recomputed([4, 5, 6]), bench.recomputed([6])
        ifkv.recompute(model, descending, [4, 5])
    assert (values_of(descending) - values_of(joint)).abs().max() > 0.01


@given(s=scenarios(), data=st.data(), as_tensor=st.booleans())
def test_law_15_the_order_of_the_slots_is_irrelevant(
    s: Scenario, data: st.DataObject, as_tensor: bool
) -> None:
    shuffled = data.draw(st.permutations(s.slots), label="shuffled")
    given_slots = torch.tensor(shuffled, dtype=torch.int32) if as_tensor else shuffled
    with prepared(s.model, s.request) as bench:
        assert_bit_equal_caches(
            bench.recomputed(given_slots, s.order), bench.recomputed(s.slots, s.order)
        )


@given(s=scenarios())
def test_law_16_no_slots_change_nothing(s: Scenario) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        assert ifkv.recompute(s.model, cache, []) is None
        assert_bit_equal_caches(cache, bench.stitch(s.order))


@given(s=scenarios(), data=st.data())
def test_law_17_fused_equals_recompute_and_then_prompt(s: Scenario, data: st.DataObject) -> None:
    early = data.draw(slot_subsets(s.total), label="recomputed before, too")
    assume(len(s.slots) + len(early) > 0)
    with prepared(s.model, s.request) as bench:
        fused, separate, native = (bench.recomputed(early, s.order) for _ in range(3))
        together = ifkv.recompute(s.model, fused, s.slots, prompt_ids=s.request.prompt)
        ifkv.recompute(s.model, separate, s.slots)
        ifkv.recompute(s.model, native, s.slots)
        after = ifkv.recompute(s.model, separate, [], prompt_ids=s.request.prompt)
        with torch.no_grad():
            plain = s.model(torch.tensor([s.request.prompt]), past_key_values=native).logits[0, -1]
    assert_close(together, after, what="logits", tolerance=EXACT)
    assert_close(together, plain, what="logits of the model's own forward", tolerance=EXACT)
    assert_rows_equal(fused, separate, what="after the prompt")
    assert_rows_equal(native, separate, what="after the model's own forward")
