"""Laws 4, 5, 8 and 28: documents made alone, stitched without loss, shared without side effects."""

import dataclasses
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import ifkv
from ifkv.cache import layer as stitched_layer
from ifkv.testing import (
    assert_bit_equal,
    assert_close,
    dense_prefill,
    dense_stitched,
    rope_types,
    shared_tiny_model,
)
from ifkv.testing.strategies import Request
from scenario import EXACT, Scenario, assert_rows_equal, keys_of, prepared, scenarios, values_of
from tried import FAMILIES

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@given(s=scenarios())
def test_documents_equal_the_oracle(s: Scenario) -> None:
    """Keys before the rotation, values, and the prefix's own rows."""
    with prepared(s.model, s.request) as bench:
        documents = bench.documents
    expected = dense_stitched(s.model, s.request.prefix, s.request.documents)
    prefix = [documents[0].prefix] if documents[0].prefix is not None else []
    parts = [*prefix, *documents]
    got = torch.cat([part.keys for part in parts], dim=2)
    assert_close(got, expected.keys_before_rope, what="keys before RoPE", tolerance=EXACT)
    got = torch.cat([part.values for part in parts], dim=2)
    assert_close(got, expected.values, what="values", tolerance=EXACT)
    assert torch.equal(torch.cat([part.token_ids for part in parts]), expected.token_ids)
    assert bool(prefix) == bool(s.request.prefix)
    assert all(document.prefix is documents[0].prefix for document in documents)


@given(s=scenarios())
def test_law_4_layer_0_is_exact_without_recompute(s: Scenario) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
    full = dense_prefill(s.model, cache.token_ids)
    assert_rows_equal(cache, full, what="in layer 0", layers=slice(0, 1))


def native_layer_0(model: PreTrainedModel, ids: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Keys and values that the model itself caches for tokens at positions from `start` on."""
    positions = torch.arange(start, start + len(ids))
    with torch.no_grad():
        model(ids[None], position_ids=positions[None], past_key_values=(cache := DynamicCache()))
    return cache.layers[0].keys, cache.layers[0].values


@pytest.mark.parametrize("dtype", DTYPES)
@given(s=scenarios())
def test_law_4_layer_0_is_bit_equal_to_a_native_forward(dtype: torch.dtype, s: Scenario) -> None:
    """One document a forward on both sides: the GEMM library promises bits for one shape only."""
    model = shared_tiny_model(**dataclasses.asdict(s.options), dtype=dtype)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(
            model, s.request.documents, prefix=s.request.prefix, batch_tokens=1
        )
        cache = ifkv.stitch(model, documents, order=s.order)
    for rows in [slice(0, cache.prefix_length), *cache.document_slices]:
        if rows.start == rows.stop:
            continue
        keys, values = native_layer_0(model, cache.token_ids[rows], rows.start)
        assert_bit_equal(cache.layers[0].keys[:, :, rows], keys, what="layer-0 keys")
        assert_bit_equal(cache.layers[0].values[:, :, rows], values, what="layer-0 values")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn", "partial"])
def test_law_4_far_positions_are_bit_equal_too(rope: str, dtype: torch.dtype) -> None:
    family, kind = ("phi3", "default") if rope == "partial" else ("llama", rope)
    model = shared_tiny_model(family, rope=kind, dtype=dtype, max_position_embeddings=1 << 17)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(97, (n,), generator=generator) for n in (700, 301, 40)]
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, ids, prefix=[1, 2], batch_tokens=1)
        cache = ifkv.stitch(model, documents)
    for rows in cache.document_slices:
        keys, values = native_layer_0(model, cache.token_ids[rows], rows.start)
        assert_bit_equal(cache.layers[0].keys[:, :, rows], keys, what="layer-0 keys")
        assert_bit_equal(cache.layers[0].values[:, :, rows], values, what="layer-0 values")


@given(s=scenarios())
def test_law_5_prefix_and_first_document_are_exact_in_every_layer(s: Scenario) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
    exact = slice(0, cache.document_slices[0].stop)
    full = dense_prefill(s.model, cache.token_ids)
    assert_rows_equal(cache, full, what="of the first document", rows=exact)


@given(s=scenarios(), batch_tokens=st.integers(1, 30))
def test_law_8_neighbours_have_no_influence(s: Scenario, batch_tokens: int) -> None:
    """Alone, side by side, in another order, in other batches, behind a prefix made before."""
    with prepared(s.model, s.request) as bench:
        ids = [s.request.documents[i] for i in s.order]
        known = bench.documents[0].prefix
        others = ifkv.prefill_documents(
            s.model,
            ids,
            prefix=s.request.prefix if known is None else known,
            batch_tokens=batch_tokens,
        )
        alone = [ifkv.prefill_documents(s.model, [one], prefix=s.request.prefix)[0] for one in ids]
    together = [bench.documents[i] for i in s.order]
    for made in (others, alone):
        for got, want in zip(made, together, strict=True):
            assert torch.equal(got.token_ids, want.token_ids)
            assert_close(got.keys, want.keys, what="keys", tolerance=EXACT)
            assert_close(got.values, want.values, what="values", tolerance=EXACT)
    assert all(document.prefix is known for document in others)


@given(s=scenarios(), page=st.integers(1, 9), headroom=st.integers(0, 3))
def test_law_28_page_size_is_irrelevant(s: Scenario, page: int, headroom: int) -> None:
    """Little pages and no headroom make the buffers grow again and again."""

    def answer() -> tuple[ifkv.StitchedCache, Tensor, Tensor]:
        with prepared(s.model, s.request) as bench:
            cache = bench.stitch(s.order)
            ifkv.recompute(s.model, cache, s.slots)
            ids = ifkv.generate(s.model, cache, s.request.prompt, max_new_tokens=5, do_sample=False)
            logits = ifkv.recompute(s.model, cache, [], prompt_ids=s.request.prompt)
            assert logits is not None
            return cache, ids, logits

    cache, ids, logits = answer()
    with (
        patch.object(stitched_layer, "PAGE", page),
        patch.object(stitched_layer, "HEADROOM", headroom),
    ):
        other_cache, other_ids, other_logits = answer()
    assert other_cache.layers[0].key_buffer.shape[2] < cache.layers[0].key_buffer.shape[2]
    assert torch.equal(other_ids, ids)
    assert_bit_equal(keys_of(other_cache), keys_of(cache), what="keys")
    assert_bit_equal(values_of(other_cache), values_of(cache), what="values")
    assert_bit_equal(other_logits, logits, what="logits")


@given(s=scenarios())
def test_law_28_a_document_shared_by_two_requests_is_mutated_by_neither(s: Scenario) -> None:
    with prepared(s.model, s.request) as bench:
        first = bench.documents[0]
        parts = bench.documents + ([first.prefix] if first.prefix is not None else [])
        before = [(part.keys.clone(), part.values.clone()) for part in parts]
        one, two = bench.stitch(), bench.stitch(s.order)
        untouched = two.clone()
        ifkv.recompute(s.model, one, s.slots, prompt_ids=s.request.prompt)
        ifkv.generate(s.model, one, s.request.prompt, max_new_tokens=3, do_sample=False)
        assert_bit_equal(keys_of(two), keys_of(untouched), what="the other request's keys")
        assert_bit_equal(values_of(two), values_of(untouched), what="the other request's values")
        ifkv.recompute(s.model, two, range(s.total))
    for part, (keys, values) in zip(parts, before, strict=True):
        assert_bit_equal(part.keys, keys, what="the document's keys")
        assert_bit_equal(part.values, values, what="the document's values")


@given(s=scenarios(min_slots=1))
def test_law_28_clones_share_nothing(s: Scenario) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        twin, expected = cache.clone(), bench.stitch(s.order)
        ifkv.recompute(s.model, cache, s.slots, prompt_ids=s.request.prompt)
        assert twin.prompt_ids is None
        assert_bit_equal(keys_of(twin), keys_of(expected), what="keys")
        appended = cache.clone()
        cache.crop()
    assert appended.get_seq_length() == s.total + len(s.request.prompt)
    assert appended.prompt_ids is not None
    assert cache.get_seq_length() == s.total


def test_families_and_rope_types_that_are_refused() -> None:
    """Dynamic frequencies depend on the past; longrope is verified for phi3 alone."""
    for family in FAMILIES:
        for rope in rope_types(family):
            if rope == "dynamic" or (rope == "longrope" and family != "phi3"):
                with pytest.raises(ifkv.IfkvError, match=rope):
                    ifkv.patch(shared_tiny_model(family, rope=rope))


def test_longrope_is_refused_from_its_crossing_on() -> None:
    model = shared_tiny_model("phi3", rope="longrope")
    request = Request([1], [[2] * 31, [3] * 32], [4], [5])  # 64 tokens: the last short position
    with prepared(model, request) as bench:
        cache = bench.stitch()
        with pytest.raises(ifkv.IfkvError, match="longrope"):
            ifkv.recompute(model, cache, [], prompt_ids=[5])
        with pytest.raises(ifkv.IfkvError, match="longrope"):
            ifkv.score(model, cache, [4])
        with pytest.raises(ifkv.IfkvError, match="longrope"):
            ifkv.stitch(model, [*bench.documents, bench.documents[0]])
        with pytest.raises(ifkv.IfkvError, match="longrope"), torch.no_grad():
            model(torch.tensor([[5]]), past_key_values=cache)


def test_an_answer_across_the_crossing_of_longrope_is_upstreams() -> None:
    """Phi-3's own generate drops the cache there and starts anew with the other frequencies."""
    model = shared_tiny_model("phi3", rope="longrope")
    ids = torch.arange(60)[None]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    with prepared(model, Request([], [list(range(58))], [6], [58, 59])) as bench:
        got = ifkv.generate(model, bench.stitch(), [58, 59], max_new_tokens=12)
    assert torch.equal(got, expected[:, 58:])


def test_a_long_native_forward_leaves_longrope_documents_valid() -> None:
    model = shared_tiny_model("phi3", rope="longrope")
    with prepared(model, Request([1], [[2, 3], [4, 5]], [6], [7])) as bench:
        before = keys_of(bench.stitch())
    with torch.no_grad():
        model(torch.arange(70)[None])
    with ifkv.patch(model):
        assert_bit_equal(keys_of(bench.stitch()), before, what="keys")
