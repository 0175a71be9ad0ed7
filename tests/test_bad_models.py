"""A model that ifkv cannot serve, or that did not make what is given, is refused in words."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

import ifkv
from ifkv.errors import (
    FingerprintMismatchError,
    GeometryError,
    InvalidInputError,
    NotPatchedError,
    UnsupportedModelError,
    UnsupportedRopeError,
)
from ifkv.testing import assert_bit_equal, tiny_model

PREFIX = [1, 2]
DOCUMENTS = [[3, 14, 15, 92, 6], [53, 58], [79, 32, 38]]
PROMPT = [26, 43]


def test_an_unpatched_model_is_refused_everywhere() -> None:
    model = tiny_model("llama")
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        cache = ifkv.stitch(model, documents)
    calls: list[Callable[[Any], Any]] = [
        lambda m: ifkv.prefill_documents(m, DOCUMENTS),
        lambda m: ifkv.stitch(m, documents),
        lambda m: ifkv.score(m, cache, PROMPT),
        lambda m: ifkv.reorder(m, documents, PROMPT),
        lambda m: ifkv.recompute(m, cache, [3]),
        lambda m: ifkv.generate(m, cache, PROMPT),
    ]
    for call in calls:
        for subject in (model, "a name", None):
            with pytest.raises(NotPatchedError, match=r"not patched.*ifkv\.patch"):
                call(subject)


def config_of(**options: Any) -> Any:
    return tiny_model("llama", num_layers=1, **options).config


UNSUPPORTED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "model type": (
        UnsupportedModelError,
        r"'gpt2'.*known are llama.*patches/",
        lambda: GPT2LMHeadModel(
            GPT2Config(n_layer=1, n_embd=8, n_head=1, bos_token_id=None, eos_token_id=None)
        ).eval(),
    ),
    "no head": (
        UnsupportedModelError,
        r"LlamaModel has no language-model head.*ForCausalLM",
        lambda: tiny_model("llama", num_layers=1).base_model,
    ),
    "another head": (
        UnsupportedModelError,
        r"SequenceClassification has no language-model head",
        lambda: AutoModelForSequenceClassification.from_config(config_of()).eval(),
    ),
    "no model": (UnsupportedModelError, r"is of type str, but .*from_pretrained", lambda: "llama"),
    "training mode": (
        UnsupportedModelError,
        r"training mode.*eval\(\)",
        lambda: tiny_model("llama", num_layers=1).train(),
    ),
    "dynamic rope": (
        UnsupportedRopeError,
        r"'dynamic'.*longest sequence seen.*Supported are default",
        lambda: tiny_model("llama", num_layers=1, rope="dynamic"),
    ),
    "a rope the family was not verified with": (
        UnsupportedRopeError,
        r"'longrope'.*not among the verified.*Supported are default",
        lambda: tiny_model("llama", num_layers=1, rope="longrope"),
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_refused_and_left_alone(name: str) -> None:
    error, message, build = UNSUPPORTED[name]
    model = build()
    config = getattr(model, "config", None)
    before = copy.deepcopy(vars(config)) if config is not None else None
    with pytest.raises(error, match=message):
        ifkv.patch(model)
    if config is not None:
        assert vars(config) == before
        parts = [m for m in model.modules() if hasattr(m, "config")]
        assert all(type(part.config) is type(config) for part in parts)


def test_a_layer_the_family_does_not_know_is_refused() -> None:
    model = tiny_model("llama", num_layers=2)
    model.base_model.layers[1].self_attn = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"layer 1 has attention Identity.*Llama"):
        ifkv.patch(model)


OTHER_MODELS: dict[str, dict[str, Any]] = {
    "weights": dict(seed=1),
    "dtype": dict(dtype=torch.bfloat16),
    "rope theta": dict(rope=dict(rope_type="default", rope_theta=500.0)),
    "rope type": dict(rope="linear"),
    "rope scaling": dict(rope="yarn"),
}


@pytest.mark.parametrize("difference", OTHER_MODELS)
def test_documents_of_a_model_that_differs_are_refused(difference: str) -> None:
    options = dict(dtype=torch.float32, num_layers=2)
    model, other = (
        tiny_model("llama", **options),
        tiny_model("llama", **(options | OTHER_MODELS[difference])),
    )
    with ifkv.patch(model), ifkv.patch(other):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        cache = ifkv.stitch(model, documents)
        with pytest.raises(FingerprintMismatchError, match=r"dtype or rope configuration"):
            ifkv.stitch(other, documents)
        with pytest.raises(FingerprintMismatchError, match=r"prefix was made by model"):
            ifkv.prefill_documents(other, DOCUMENTS, prefix=documents[0].prefix)
        for call in (
            lambda: ifkv.score(other, cache, PROMPT),
            lambda: ifkv.recompute(other, cache, [3]),
            lambda: ifkv.generate(other, cache, PROMPT),
        ):
            with pytest.raises(FingerprintMismatchError, match=r"cache belongs to model"):
                call()


def test_longrope_is_refused_where_its_frequencies_change() -> None:
    model = tiny_model("phi3", rope="longrope")
    limit = model.config.original_max_position_embeddings
    reason = rf"longrope changes its frequencies beyond {limit} positions"
    with ifkv.patch(model):
        with pytest.raises(InvalidInputError, match=reason):
            ifkv.prefill_documents(model, [[5] * (limit + 1)])
        documents = ifkv.prefill_documents(model, [[5] * 30, [6] * 30, [7] * 30])
        with pytest.raises(InvalidInputError, match=reason):
            ifkv.stitch(model, documents)
        cache = ifkv.stitch(model, documents[:2])
        keys = cache.layers[0].keys.clone()
        calls: list[Callable[[], Any]] = [
            lambda: ifkv.score(model, cache, [5] * 5),
            lambda: ifkv.recompute(model, cache, [3], prompt_ids=[5] * 5),
            lambda: ifkv.generate(model, cache, [5] * 5),
        ]
        for call in calls:
            with pytest.raises(InvalidInputError, match=reason):
                call()
        by_hand = cache.clone()
        model(torch.tensor([[5] * 4]), past_key_values=by_hand)
        with pytest.raises(GeometryError, match=rf"longrope.*{limit}.*max_new_tokens"):
            model(torch.tensor([[5]]), past_key_values=by_hand)
        assert_bit_equal(cache.layers[0].keys, keys, what="keys after refusals")
        assert ifkv.generate(model, cache, [5] * 2, max_new_tokens=3).shape == (1, 5)
