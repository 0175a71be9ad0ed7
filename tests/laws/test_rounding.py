"""Caches in 8 bits: the fast path against the obvious one, whatever runs over them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ifkv
from ifkv.backends import quantized
from ifkv.backends.fp8 import quantize
from ifkv.backends.spec import AttentionSpec
from ifkv.cache.layout import GEOMETRIES
from ifkv.errors import GeometryError
from ifkv.selectors import Budget, Request, names, resolve
from ifkv.testing import assert_close, shared_tiny_model
from rounded_by_hand import AXES, BACKENDS, DOCUMENTS, PREFIX, PROMPT, assert_same_rows, both
from scenario import EXACT, Scenario, scenarios


@given(s=scenarios(), backend=st.sampled_from(list(BACKENDS)))
def test_a_rounded_cache_equals_one_rounded_by_hand(s: Scenario, backend: str) -> None:
    """Stitching, scores, recompute with prompt, and a decoding step."""
    with ifkv.patch(s.model, backend=BACKENDS[backend]), torch.no_grad():
        documents = ifkv.prefill_documents(s.model, s.request.documents, prefix=s.request.prefix)
        cache, twin = both(s.model, documents, order=s.order)
        assert_same_rows(cache, twin, "as stitched")
        got, want = (
            ifkv.score(s.model, each, s.request.query, layers=[0, -1]) for each in (cache, twin)
        )
        assert_close(got, want, what="scores", tolerance=1e-6)
        got, want = (
            ifkv.recompute(s.model, each, s.slots, prompt_ids=s.request.prompt)
            for each in (cache, twin)
        )
        assert_close(got, want, what="logits", tolerance=EXACT)
        assert_same_rows(cache, twin, "after recompute")
        got, want = (
            s.model(torch.tensor([[7]]), past_key_values=each).logits for each in (cache, twin)
        )
        assert_close(got, want, what="next logits", tolerance=EXACT, axes=("a", "b", "c"))
        assert_same_rows(cache, twin, "after a step")


@pytest.mark.parametrize("backend", ["reference", "split"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["greedy", "beams", "beams returned", "samples"],
)
def test_generate_gives_the_same_answer(family, how, backend):
    sliding = {"sliding_window": 20} if family == "mistral" else {}
    model = shared_tiny_model(family, **sliding)
    how = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, **how}
    with ifkv.patch(model, backend=BACKENDS[backend]):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        answers = []
        for cache in both(model, documents):
            torch.manual_seed(0)
            ifkv.recompute(model, cache, range(45, 70, 2), prompt_ids=PROMPT)
            answers.append(ifkv.generate(model, cache, PROMPT, **how).tolist())
            assert cache.get_seq_length() == cache.context_length
    assert answers[0] == answers[1]


def test_a_padding_mask_is_obeyed():
    """What the backend does not decode goes to the model's own attention, widened."""
    model = shared_tiny_model("llama")
    with ifkv.patch(model), torch.no_grad():
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        logits = []
        for cache in both(model, documents):
            mask = torch.ones(1, cache.context_length + 2, dtype=torch.long)
            mask[0, 3:30] = 0
            ids = torch.tensor([[8, 9]])
            logits.append(model(ids, past_key_values=cache, attention_mask=mask).logits)
    assert_close(logits[0], logits[1], what="logits", tolerance=EXACT, axes=("a", "b", "c"))


@pytest.mark.parametrize("name", names())
def test_every_selector_chooses_what_it_would_by_hand(name):
    model = shared_tiny_model("qwen2")
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        request = Request(PROMPT, PROMPT[1:3], documents, None)
        chosen = [
            resolve(name).select(model, cache, request, Budget.of(0.3))
            for cache in both(model, documents)
        ]
    assert chosen[0].slots.tolist() == chosen[1].slots.tolist()
    if chosen[0].scores is not None:
        assert_close(chosen[0].scores, chosen[1].scores, what="scores", tolerance=1e-6)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry_can_be_scored(geometry):
    model = shared_tiny_model("llama")
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        cache, twin = both(model, documents, geometry=geometry)
        got, want = (ifkv.score(model, each, PROMPT) for each in (cache, twin))
        assert_close(got, want, what="scores", tolerance=1e-6)
        if geometry != "global":
            with pytest.raises(GeometryError, match="can only be scored"):
                model(torch.tensor([[8]]), past_key_values=cache)


@given(
    data=st.data(),
    rows=st.integers(1, 6),
    count=st.integers(1, 23),
    step=st.integers(1, 9),
    masked=st.booleans(),
)
def test_blocks_equal_one_shot(data, rows, count, step, masked):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    query = torch.randn(1, 4, rows, 8, generator=generator, dtype=torch.float64)
    keys, values = (quantize(torch.randn(1, 2, count, 8, generator=generator), 1.0) for _ in "kv")
    mask = torch.rand(rows, count, generator=generator) < 0.7 if masked else None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(quantized, "BLOCK_SLOTS", step)
        got = quantized.attend_quantized(query, keys, values, AttentionSpec(0.3), mask=mask)
    wide = [x.double().repeat_interleave(2, dim=1) for x in (keys, values)]
    logits = query @ wide[0].mT * 0.3
    if mask is not None:
        logits = logits.masked_fill(mask, -math.inf)
    want = logits.softmax(-1).nan_to_num() @ wide[1]
    assert_close(got[0], want, what="output", tolerance=EXACT, axes=AXES)
    lse = logits.logsumexp(-1)
    assert torch.equal(got[1].isneginf(), lse.isneginf())
    assert_close(
        got[1].nan_to_num(neginf=0),
        lse.nan_to_num(neginf=0),
        what="lse",
        tolerance=EXACT,
        axes=("a", "b", "c"),
    )
