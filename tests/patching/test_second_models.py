"""Models built from a patched model's config: both run, the first bit for bit as before."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import ifkv
from ifkv.testing import assert_bit_equal, tiny_model

IDS = torch.tensor([[5, 9, 33, 2, 71, 40], [11, 60, 3, 3, 22, 90]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
# Each makes a model from another's config, which while it is patched is an overlay.
WAYS: dict[str, Callable[[Any], Any]] = {
    "the stack's class": lambda m: type(m.model)(m.model.config),
    "the model's class": lambda m: type(m)(m.model.config),
    "a layer's config": lambda m: type(m)(m.model.layers[0].self_attn.config),
    "AutoModel": lambda m: AutoModel.from_config(m.model.config),
    "AutoModelForCausalLM": lambda m: AutoModelForCausalLM.from_config(m.model.config),
    "the config's class": lambda m: type(m)(type(m.model.config)(**m.config.to_dict())),
    "from_dict": lambda m: type(m)(m.model.config.from_dict(m.config.to_dict())),
    "a copy": lambda m: type(m)(copy.deepcopy(m.model.config)),
}


def built(way: str, model: Any) -> Any:
    torch.manual_seed(0)
    return WAYS[way](model).to(model.dtype).eval()


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(IDS, attention_mask=MASK, use_cache=False).values()))


def usable(model: Any) -> bool:
    cache = ifkv.stitch(model, ifkv.prefill_documents(model, [[1, 2, 3], [4, 5]], prefix=[6]))
    return ifkv.generate(model, cache, [7, 8], max_new_tokens=2).shape == (1, 4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_both_models_run_under_the_patch_and_after_it(way: str, implementation: str) -> None:
    model: Any = tiny_model("mistral", dtype=torch.float32, num_layers=2, sliding_window=4)
    model.set_attn_implementation(implementation)
    first, second = run(model), run(built(way, model))
    ifkv.patch(model)
    twin = built(way, model)
    assert_bit_equal(run(twin), second, what="the second while the first is patched")
    assert_bit_equal(run(model), first, what="the patched first")
    assert usable(model)
    ifkv.unpatch(model)
    assert model.config._attn_implementation == implementation
    assert_bit_equal(run(model), first, what="the first after unpatching")
    assert_bit_equal(run(twin), second, what="the second after unpatching")
    assert twin.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("undone", ["first", "second"])
def test_the_second_can_be_patched_too(undone: str) -> None:
    model: Any = tiny_model("llama", num_layers=2)
    ifkv.patch(model)
    twin = built("the model's class", model)
    first, second = run(model), run(twin)
    ifkv.patch(twin)
    models = [model, twin] if undone == "first" else [twin, model]
    for each in (*models, *models):
        assert usable(each)
    for each in models:
        ifkv.unpatch(each)
        assert_bit_equal(run(model), first, what="the first")
        assert_bit_equal(run(twin), second, what="the second")
    with ifkv.patch(twin):
        assert usable(twin)


def test_the_second_outlives_a_patched_first() -> None:
    model: Any = tiny_model("llama", num_layers=2)
    ifkv.patch(model)
    twin = built("the stack's class", model)
    expected = run(twin)
    del model
    gc.collect()
    assert_bit_equal(run(twin), expected, what="the second, alone")


def test_the_second_shares_its_config_as_upstream_s_models_do() -> None:
    model: Any = tiny_model("llama", num_layers=2)
    with ifkv.patch(model):
        twin = built("the model's class", model)
        twin.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"
        assert usable(model)
