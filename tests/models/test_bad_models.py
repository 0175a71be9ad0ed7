"""A model that ifkv cannot serve, or that did not make what is given, is refused in words."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
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


class Wrapper(torch.nn.Module):
    """A model inside another module, as adapters and data parallelism have it."""

    def __init__(self, model: Any):
        super().__init__()
        self.inner = model
        self.config = model.config


class Adapted(Wrapper):
    """One that passes for the model, whose decoder stack it nests one level deeper."""

    @property
    def base_model(self) -> Any:
        return Wrapper(self.inner)

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()


def offloaded() -> Any:
    model = tiny_model("llama", num_layers=2)
    model.base_model.layers[1].to("meta")
    return model


def marked(name: str, value: object, *, known: bool = True) -> Any:
    """A model with a mark set that transformers knows, or one that peft sets."""
    model = tiny_model("llama", num_layers=1)
    assert hasattr(model, name) is known
    setattr(model, name, value)
    return model


def spread() -> Any:
    model = tiny_model("llama", num_layers=1)
    places = [SimpleNamespace(device=torch.device("cuda", index)) for index in (0, 1)]
    model.parameters = lambda *_: iter(places)  # there need not be two GPUs here
    return model


UNSUPPORTED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "model type": (
        UnsupportedModelError,
        r"'gpt2', which ifkv cannot work with: its positions are learned embeddings",
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
    "a wrapper": (
        UnsupportedModelError,
        r"Wrapper is no model of transformers itself; patch the one that it wraps",
        lambda: Wrapper(tiny_model("llama", num_layers=1)).eval(),
    ),
    "a wrapper that looks like a model": (
        UnsupportedModelError,
        r"has no 'embed_tokens'.*If Adapted wraps a model, patch that one",
        lambda: Adapted(tiny_model("llama", num_layers=1)).eval(),
    ),
    "a layer offloaded": (UnsupportedModelError, r"not in memory.*from_pretrained", offloaded),
    "weights never loaded": (
        UnsupportedModelError,
        r"not in memory.*from_pretrained",
        lambda: tiny_model("llama", num_layers=1).to("meta"),
    ),
    "two devices": (UnsupportedModelError, r"spread over cuda:0, cuda:1.*from_pretrained", spread),
    "split between processes": (
        UnsupportedModelError,
        r"split between processes.*tp_plan",
        lambda: marked("_tp_size", 2),
    ),
    "adapters": (
        UnsupportedModelError,
        r"carries adapters.*merge_and_unload",
        lambda: marked("_hf_peft_config_loaded", True),
    ),
    "adapters by peft": (
        UnsupportedModelError,
        r"carries adapters.*merge_and_unload",
        lambda: marked("peft_config", {}, known=False),
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


def test_adapters_that_come_after_the_patch_are_refused() -> None:
    model: Any = tiny_model("llama", num_layers=1)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS)
        model.peft_config = {}
        for call in (ifkv.prefill_documents, ifkv.stitch):
            with pytest.raises(UnsupportedModelError, match="carries adapters"):
                call(model, documents if call is ifkv.stitch else DOCUMENTS)
        del model.peft_config
        assert len(ifkv.stitch(model, documents).token_ids) == 10


def test_autocast_to_another_dtype_is_refused_before_anything_changes() -> None:
    with ifkv.patch(model := tiny_model("llama", dtype=torch.float32, num_layers=2)):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        cache = ifkv.stitch(model, documents)
        expected = copy.deepcopy(cache)
        calls: list[Callable[[], Any]] = [
            lambda: ifkv.patch(model),
            lambda: ifkv.prefill_documents(model, DOCUMENTS),
            lambda: ifkv.stitch(model, documents),
            lambda: ifkv.score(model, cache, PROMPT),
            lambda: ifkv.recompute(model, cache, [8]),
            lambda: ifkv.generate(model, cache, PROMPT),
        ]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for call in calls:
                with pytest.raises(UnsupportedModelError, match=r"autocast to torch\.bfloat16"):
                    call()
        for layer, before in zip(cache.layers, expected.layers, strict=True):
            assert_bit_equal(layer.keys, before.keys, what="keys after refusals")


def test_autocast_to_the_model_s_own_dtype_changes_nothing() -> None:
    with ifkv.patch(model := tiny_model("llama", dtype=torch.bfloat16, num_layers=2)):
        caches = []
        for on in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
                documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
                caches.append(ifkv.stitch(model, documents))
                ifkv.recompute(model, caches[-1], [8, 9])
        for layer, other in zip(caches[0].layers, caches[1].layers, strict=True):
            assert_bit_equal(other.keys, layer.keys, what="keys under autocast")


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
