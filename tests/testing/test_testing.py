"""The testing tools themselves: models, tokenizer, assertions and strategies."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from ifkv.testing import (
    assert_bit_equal,
    assert_close,
    assert_within_floor,
    rope_types,
    tiny_model,
    tiny_tokenizer,
    truth_model,
)
from ifkv.testing import strategies as own
from tried import FAMILIES

# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_weights_in_every_dtype(family: str) -> None:
    wide = dict(tiny_model(family).named_parameters())
    assert all(torch.equal(w, wide[n]) for n, w in tiny_model(family).named_parameters())
    half = tiny_model(family, dtype=torch.bfloat16)
    assert all(torch.equal(w, wide[n].to(w.dtype)) for n, w in half.named_parameters())
    other = dict(tiny_model(family, seed=1).named_parameters())
    assert not any(torch.equal(w, other[n]) for n, w in wide.items())


def test_building_a_model_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    tiny_model()
    assert torch.equal(torch.get_rng_state(), before)


def weight_types(model: PreTrainedModel) -> set[torch.dtype]:
    """Dtypes of all weights but the routers that upstream keeps in float32."""
    return {
        weight.dtype
        for name, weight in model.named_parameters()
        if not (name.endswith("mlp.gate.weight") and weight.dtype == torch.float32)
    } or {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_inv_freq_is_float32_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    for rope in rope_types(family):
        model = tiny_model(family, dtype=dtype, rope=rope)
        reference = tiny_model(family, dtype=torch.float32, rope=rope).model.rotary_emb.inv_freq
        assert_bit_equal(model.model.rotary_emb.inv_freq, reference, what="inv_freq")
        assert weight_types(model) == {dtype}
        twin = truth_model(model)
        assert_bit_equal(twin.model.rotary_emb.inv_freq, reference, what="inv_freq of the truth")
        assert {weight.dtype for weight in twin.parameters()} == {torch.float64}
        assert weight_types(model) == {dtype}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_not_degenerate(family: str) -> None:
    model = tiny_model(family)
    assert not model.training
    for name, weight in model.named_parameters():
        assert weight.std() > 0.05, name
    with torch.no_grad():
        logits = model(torch.arange(40)[None]).logits
    assert 1.5 < logits.std() < 6


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_matters(family: str) -> None:
    """A mistake in any one weight's use would show: changing it changes the logits."""
    model, ids = tiny_model(family), torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids).logits
        for name, weight in model.named_parameters():
            kept = weight.clone()
            weight.copy_(
                kept.roll(1, 0 if len(kept) > 1 else -1)
            )  # qk-norm would undo a mere factor
            assert (model(ids).logits - before).abs().max() > 0.01, name
            weight.copy_(kept)


def test_a_model_that_upstream_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="gpt17"):
        tiny_model("gpt17")
    with pytest.raises(ValueError, match="yarn"):
        tiny_model("phi3", rope="yarn")
    with pytest.raises(ValueError, match="no sliding window"):
        tiny_model("llama", sliding_window=8)


# --- tokenizer ------------------------------------------------------------------------------------


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text) == [tokenizer.bos_token_id, *ids]
    if not any(token in text for token in tokenizer.all_special_tokens):
        assert len(ids) == len(text.encode())


def test_the_chat_template_marks_roles_and_starts_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    starts = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(starts) == 3
    assert ids.count(tokenizer.eos_token_id) == 2
    assert max(ids) < len(tokenizer)


def test_a_model_with_the_tokenizers_vocabulary_generates_text() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    ids = torch.tensor([tokenizer.encode("Hello")])
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert isinstance(tokenizer.decode(out[0]), str)


# --- assertions -----------------------------------------------------------------------------------


def test_close_names_the_worst_element_and_all_axes() -> None:
    expected = torch.zeros(3, 2, 5, 4, dtype=torch.float64)
    actual = expected.clone()
    actual[1, 0, 3, 2], actual[2, 0, 4, 2] = 1e-3, 5e-3
    with pytest.raises(AssertionError) as caught:
        assert_close(actual, expected, what="keys after stitching")
    message = str(caught.value)
    assert "keys after stitching: not within 1.0e-10 in 2 of 120 elements" in message
    assert "worst at layer 2, head 0, slot 4, channel 2: 0.005, expected 0.0" in message
    assert "layer 1, 2 (2 of 3); head 0 (1 of 2); slot 3, 4 (2 of 5)" in message


def test_close_scales_with_the_expected_value() -> None:
    expected = torch.tensor([1e6, 0.0], dtype=torch.float64)
    assert_close(expected + torch.tensor([9e-6, 9e-12]), expected, what="x", tolerance=1e-11)
    with pytest.raises(AssertionError, match="slot 1"):
        assert_close(expected + torch.tensor([0.0, 9e-6]), expected, what="x", tolerance=1e-11)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_close_never_accepts_what_is_not_finite(bad: float) -> None:
    poisoned = torch.tensor([1.0, bad])
    for actual, expected in ((poisoned, torch.ones(2)), (poisoned, poisoned)):
        with pytest.raises(AssertionError, match="worst at slot 1"):
            assert_close(actual, expected, what="scores")


def test_close_refuses_shapes_that_would_broadcast_and_half_precision() -> None:
    with pytest.raises(AssertionError, match=r"shape is \(1, 3\), expected \(3,\)"):
        assert_close(torch.ones(1, 3), torch.ones(3), what="scores")
    with pytest.raises(ValueError, match="assert_within_floor"):
        assert_close(torch.ones(3).bfloat16(), torch.ones(3), what="scores")


def test_bit_equal_sees_one_bit_and_the_dtype() -> None:
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    assert_bit_equal(x, x.clone(), what="x")
    y = x.clone()
    y[1, 2] += torch.finfo(torch.bfloat16).eps
    with pytest.raises(AssertionError, match="row 1, token 2"):
        assert_bit_equal(y, x, what="x")
    with pytest.raises(AssertionError, match=r"dtype is torch\.float32"):
        assert_bit_equal(x.float(), x, what="x")


@pytest.mark.parametrize("measure", ["max", "rms"])
def test_within_floor_compares_with_the_plain_error(measure: str) -> None:
    truth = torch.randn(50, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = (truth + 0.02).half()
    check = {"what": "logits", "measure": measure}
    assert_within_floor((truth - 0.03).half(), plain, truth, **check)
    assert_within_floor(truth.half(), truth.half(), truth, **check)
    with pytest.raises(AssertionError, match=r"plain error [12]\.\d+e-02, allowed 2 times"):
        assert_within_floor((truth + 0.05).half(), plain, truth, **check)
    broken = truth.half()
    broken[3, 4] = float("nan")
    with pytest.raises(AssertionError, match="worst at row 3, token 4"):
        assert_within_floor(broken, plain, truth, **check)
    with pytest.raises(ValueError, match=r"plain is torch\.float64"):
        assert_within_floor(truth.half(), truth, truth, **check)


# --- strategies -----------------------------------------------------------------------------------


@given(request=own.requests(), data=st.data())
def test_requests_are_valid(request: own.Request, data: st.DataObject) -> None:
    assert 0 <= len(request.prefix) <= 4
    assert 1 <= len(request.documents) <= 5
    assert all(1 <= len(document) <= 12 for document in request.documents)
    assert request.query
    assert request.prompt
    assert all(0 <= token < own.VOCAB_SIZE for token in request.context)
    total, first = len(request.context), len(request.prefix) + len(request.documents[0])
    slots = data.draw(own.slot_subsets(total, first=first))
    assert slots == sorted(set(slots))
    assert all(first <= slot < total for slot in slots)
    count = len(request.documents)
    assert sorted(data.draw(own.orders(count))) == list(range(count))


@given(options=own.model_options())
def test_every_drawn_model_can_be_built(options: own.ModelOptions) -> None:
    model = tiny_model(**vars(options))
    assert model.config.model_type == options.family


def test_the_tools_do_not_need_hypothesis() -> None:
    code = "import sys, ifkv.testing; sys.exit('hypothesis' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
