"""A cache in 8 bits: its size, copies, growth, batches and stores, and what it refuses."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given

import ifkv
from ifkv.backends import fp8
from ifkv.backends.fp8 import FLOAT8, LARGEST, dequantize
from ifkv.cache import fp8_layer
from ifkv.errors import InvalidInputError
from ifkv.store import DiskStore
from ifkv.testing import assert_bit_equal, assert_close, shared_tiny_model
from rounded_by_hand import (
    AXES,
    BACKENDS,
    DOCUMENTS,
    PREFIX,
    PROMPT,
    both,
    on_grid,
)
from scenario import EXACT, Scenario, scenarios


@given(s=scenarios())
def test_nothing_of_the_documents_saturates_and_order_does_not_change_the_scales(s: Scenario):
    with ifkv.patch(s.model):
        documents = ifkv.prefill_documents(s.model, s.request.documents, prefix=s.request.prefix)
        cache = ifkv.stitch(s.model, documents, kv_dtype=FLOAT8)
        other = ifkv.stitch(s.model, documents, kv_dtype=FLOAT8, order=s.order)
        plain = ifkv.stitch(s.model, documents)
    for layer, wide, moved in zip(cache.layers, plain.layers, other.layers, strict=True):
        assert layer.scales == pytest.approx(moved.scales)
        for got, want, scale in zip(
            layer.rows(slice(0, layer.length)), (wide.keys, wide.values), layer.scales, strict=True
        ):
            assert float(want.abs().max()) * fp8_layer.ROOM <= LARGEST * scale * (1 + 1e-6)
            bound = torch.maximum(want.abs() / 16, torch.tensor(scale * 2.0**-10))
            assert bool(((got - want).abs() <= bound * (1 + 1e-12)).all())


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_it_takes_half_of_bfloat16_and_a_quarter_of_float32(dtype, share):
    model = shared_tiny_model("llama", dtype=dtype)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        sizes = [
            sum(layer.key_buffer.nbytes + layer.value_buffer.nbytes for layer in cache.layers)
            for cache in (
                ifkv.stitch(model, documents),
                ifkv.stitch(model, documents, kv_dtype=FLOAT8),
            )
        ]
        assert sizes[0] == share * sizes[1]


def test_keys_of_a_half_precision_model_are_rounded_once():
    """Turned in float32 and rounded to 8 bits, not to bfloat16 in between."""
    model = shared_tiny_model("llama", dtype=torch.bfloat16)
    with ifkv.patch(model) as handle:
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        cache = ifkv.stitch(model, documents, kv_dtype=FLOAT8)
        cos, sin = handle.rope.cos_sin(cache.positions, torch.float32)
        for index, layer in enumerate(cache.layers):
            stored = torch.cat(
                [part.keys[index] for part in (documents[0].prefix, *documents)], dim=1
            )
            turned = ifkv.models.rope.rotate(stored.float(), cos, sin)
            got = dequantize(layer.keys[0], layer.scales.keys, torch.float32)
            assert_bit_equal(got, on_grid(turned, layer.scales.keys), what="keys", axes=AXES[:3])


def test_rows_beyond_the_range_saturate_as_they_are_written():
    model = shared_tiny_model("llama")
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        layer = ifkv.stitch(model, documents, kv_dtype=FLOAT8).layers[0]
        rows = torch.full_like(layer.rows(slice(0, 2))[0], 1e6)
        layer.write(torch.tensor([3, 5]), rows, -rows)
        keys, values = layer.rows(torch.tensor([3, 5]))
    assert set(keys.flatten().tolist()) == {LARGEST * layer.scales.keys}
    assert set(values.flatten().tolist()) == {-LARGEST * layer.scales.values}


@pytest.mark.parametrize(
    "copied",
    [
        lambda cache: cache.clone(),
        copy.deepcopy,
        lambda cache: pickle.loads(pickle.dumps(cache)),
    ],
    ids=["clone", "deepcopy", "pickle"],
)
def test_copies_are_of_their_own_and_answer_alike(copied):
    model = shared_tiny_model("llama")
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        cache = ifkv.stitch_many(model, [documents, documents[:2]], kv_dtype=FLOAT8)[0]
        twin = copied(cache)
        assert twin.kv_dtype == FLOAT8
        assert [each.scales for each in twin.layers] == [each.scales for each in cache.layers]
        before = [layer.key_buffer.view(torch.uint8).clone() for layer in cache.layers]
        want = ifkv.recompute(model, twin, [44, 60], prompt_ids=PROMPT)
        for layer, old in zip(cache.layers, before, strict=True):
            used = slice(0, layer.length)
            assert torch.equal(layer.key_buffer.view(torch.uint8)[:, :, used], old[:, :, used])
        assert torch.equal(ifkv.recompute(model, cache, [44, 60], prompt_ids=PROMPT), want)


def test_a_cache_that_grows_rounds_what_comes_with_the_scales_it_has():
    model = shared_tiny_model("llama")
    with ifkv.patch(model):
        a, b, c = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        logits = []
        for cache in both(model, [a, b]):
            scales = [layer.scales for layer in cache.layers]
            ifkv.recompute(model, cache, [44], prompt_ids=PROMPT)
            cache.keep(PROMPT)
            slots = ifkv.extend(model, cache, [c])
            assert [layer.scales for layer in cache.layers] == scales
            if cache.kv_dtype is None:  # extend writes into a plain cache's buffers past write()
                for layer in cache.layers:
                    at = slots[0], slots[-1] + 1
                    for buffer, scale in zip(
                        (layer.key_buffer, layer.value_buffer), layer.by_hand, strict=True
                    ):
                        rows = buffer[:, :, at[0] : at[1]]
                        rows.copy_(on_grid(rows, scale))
            logits.append(ifkv.recompute(model, cache, slots[3:9], prompt_ids=[8, 9]))
    assert_close(logits[0], logits[1], what="logits", tolerance=EXACT)


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_requests_together_are_requests_one_by_one(backend):
    model = shared_tiny_model("qwen3")
    with ifkv.patch(model, backend=BACKENDS[backend]):
        a, b, c = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        requests = [[a, b, c], [c, a], [b]]
        slots, prompts = [[44, 50], [40, 41], []], [PROMPT, [4], [5, 6]]
        together = ifkv.stitch_many(model, requests, kv_dtype=FLOAT8)
        alone = [ifkv.stitch(model, own, kv_dtype=FLOAT8) for own in requests]
        for one, other in zip(together, alone, strict=True):
            for layer, its in zip(one.layers, other.layers, strict=True):
                assert layer.scales == its.scales
                assert torch.equal(layer.keys.view(torch.uint8), its.keys.view(torch.uint8))
        got = ifkv.score_many(model, together, prompts)
        for scores, cache, query in zip(got, alone, prompts, strict=True):
            assert_close(scores, ifkv.score(model, cache, query), what="scores", tolerance=1e-6)
        ifkv.recompute_many(model, together, slots, prompts=prompts)
        answers = ifkv.generate_many(model, together, prompts, max_new_tokens=5)
        for answer, cache, own, prompt in zip(answers, alone, slots, prompts, strict=True):
            ifkv.recompute(model, cache, own, prompt_ids=prompt)
            want = ifkv.generate(model, cache, prompt, max_new_tokens=5, do_sample=False)
            assert answer.tolist() == want[0, len(prompt) :].tolist()


@pytest.mark.parametrize("codec", ["exact", "fp8"])
def test_a_store_that_reads_layer_by_layer_fills_the_same_rows(tmp_path, codec):
    """What a store keeps and what a request's cache holds are rounded independently."""
    model = shared_tiny_model("llama", dtype=torch.float32)
    with ifkv.patch(model):
        store = DiskStore(tmp_path, codec=codec)
        keys = [store.put(doc) for doc in ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)]
        lazy = ifkv.stitch(model, [store.get(key, lazy=True) for key in keys], kv_dtype=FLOAT8)
        assert lazy.loader is not None
        eager = ifkv.stitch(model, [store.get(key) for key in keys], kv_dtype=FLOAT8)
        assert [layer.scales for layer in lazy.layers] == [layer.scales for layer in eager.layers]
        for one, other in zip(lazy.layers, eager.layers, strict=True):
            for name in ("keys", "values"):
                mine, its = (getattr(each, name).view(torch.uint8) for each in (one, other))
                assert torch.equal(mine, its)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16, torch.int8])
def test_other_dtypes_are_refused_by_name(dtype):
    model = shared_tiny_model("llama")
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        for call in (
            lambda: ifkv.stitch(model, documents, kv_dtype=dtype),
            lambda: ifkv.stitch_many(model, [documents], kv_dtype=dtype),
        ):
            with pytest.raises(InvalidInputError, match=rf"kv_dtype is {dtype}; .*float8_e4m3fn"):
                call()


def test_a_device_that_cannot_convert_is_refused(monkeypatch):
    """As Metal does not, and as one that rounds to something else."""

    class Device:
        def __init__(self, error):
            self.error = error

        def __call__(self, *args, **kwargs):
            if self.error:
                raise TypeError("no Float8_e4m3fn on MPS")
            return torch.ones(2)

    fp8._refusal_of_device.cache_clear()
    try:
        for error, reason in ((True, "no Float8_e4m3fn on MPS"), (False, "1 and 300 became")):
            monkeypatch.setattr(fp8.torch, "tensor", Device(error))
            with pytest.raises(InvalidInputError, match=f"cpu cannot convert .{reason}"):
                fp8.check_kv_dtype(FLOAT8, torch.device("cpu"))
            fp8._refusal_of_device.cache_clear()
    finally:
        monkeypatch.undo()
        fp8._refusal_of_device.cache_clear()
    fp8.check_kv_dtype(FLOAT8, torch.device("cpu"))


@pytest.mark.parametrize(("bad", "part"), list(itertools.product((math.inf, math.nan), "kv")))
def test_documents_with_infinite_rows_are_refused(bad, part):
    model = shared_tiny_model("llama", dtype=torch.float32)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        (documents[1].keys if part == "k" else documents[1].values)[1, 0, 2, 3] = bad
        with pytest.raises(InvalidInputError, match=f"documents' .* reach {bad}"):
            ifkv.stitch(model, documents, kv_dtype=FLOAT8)
