"""A model whose config counts fewer layers than it holds: ifkv runs those that upstream runs."""

from typing import Any

import pytest
import torch

import ifkv
from ifkv.cost import ModelShape
from ifkv.errors import FingerprintMismatchError, UnsupportedModelError
from ifkv.models.decoder import DecoderView
from ifkv.testing import assert_close, tiny_model
from tried import FAMILIES

PREFIX = [1, 2]
DOCUMENTS = [[3, 14, 15, 92, 6], [53, 58, 9], [79, 32, 38, 46]]
PROMPT = [26, 43, 38]


def shortened(family: str, layers: int = 2) -> Any:
    model = tiny_model(family, dtype=torch.float32)
    model.config.num_hidden_layers = layers
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_that_upstream_runs_are_run(family: str) -> None:
    model = shortened(family)
    ids = [*PREFIX, *(token for document in DOCUMENTS for token in document), *PROMPT]
    expected = model(torch.tensor([ids])).logits[0, -1]
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        assert documents[0].keys.shape[0] == 2
        cache = ifkv.stitch(model, documents)
        rows = range(len(PREFIX) + len(DOCUMENTS[0]), cache.context_length)
        scores = ifkv.score(model, cache, PROMPT)
        logits = ifkv.recompute(model, cache, rows, prompt_ids=PROMPT)
        output = ifkv.generate(model, cache, PROMPT, max_new_tokens=3, do_sample=False)
    assert logits is not None
    assert_close(logits, expected, what="logits of everything recomputed", tolerance=1e-5)
    native = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)
    assert output[0, len(PROMPT) :].tolist() == native[0, len(ids) :].tolist()
    twin = ifkv.testing.tiny_model(family, dtype=torch.float32, num_layers=2)
    with ifkv.patch(twin):
        other = ifkv.stitch(twin, ifkv.prefill_documents(twin, DOCUMENTS, prefix=PREFIX))
        assert_close(scores, ifkv.score(twin, other, PROMPT), what="scores", tolerance=1e-5)


def test_rows_by_depth_and_batches_run_them_too() -> None:
    model, twin = shortened("llama"), tiny_model("llama", dtype=torch.float32, num_layers=2)
    found = []
    for each in (model, twin):
        with ifkv.patch(each):
            documents = ifkv.prefill_documents(each, DOCUMENTS, prefix=PREFIX)
            cache = ifkv.stitch(each, documents)
            by_depth = ifkv.recompute(
                each, cache, [8, 9, 10], prompt_ids=PROMPT, depths=torch.tensor([1, 2, 2])
            )
            caches = ifkv.stitch_many(each, [documents, documents[:2]])
            many = ifkv.generate_many(each, caches, [PROMPT, PROMPT], max_new_tokens=3)
            found.append((by_depth, [ids.tolist() for ids in many]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_shapes_and_layer_numbers_are_of_the_layers_that_run() -> None:
    model = shortened("llama")
    assert (DecoderView(model).num_layers, len(DecoderView(model).layers)) == (2, 2)
    assert ModelShape.of(model) == ModelShape.of(
        tiny_model("llama", dtype=torch.float32, num_layers=2)
    )
    with ifkv.patch(model):
        cache = ifkv.stitch(model, ifkv.prefill_documents(model, DOCUMENTS))
        with pytest.raises(ifkv.IfkvError, match="layer"):
            ifkv.score(model, cache, PROMPT, layers=[2])


def test_a_count_that_changes_under_a_patch_makes_another_model() -> None:
    model: Any = tiny_model("llama", dtype=torch.float32)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        cache = ifkv.stitch(model, documents)
        model.config.num_hidden_layers = 2
        with pytest.raises(FingerprintMismatchError):
            ifkv.stitch(model, documents)
        with pytest.raises(FingerprintMismatchError):
            ifkv.score(model, cache, PROMPT)
        model.config.num_hidden_layers = 3
        assert ifkv.score(model, cache, PROMPT).shape == (cache.context_length,)


def test_a_window_that_changes_under_a_patch_makes_another_model() -> None:
    model: Any = tiny_model("mistral", dtype=torch.float32, sliding_window=5)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        model.config.sliding_window = 3
        with pytest.raises(FingerprintMismatchError):
            ifkv.stitch(model, documents)


def test_a_factor_that_changes_under_a_patch_makes_another_model() -> None:
    model: Any = tiny_model("llama", dtype=torch.float32)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        model.model.layers[1].self_attn.scaling *= 2
        with pytest.raises(FingerprintMismatchError):
            ifkv.stitch(model, documents)
    twin: Any = tiny_model("llama", dtype=torch.float32)
    twin.model.layers[1].self_attn.scaling *= 2
    with ifkv.patch(twin):
        again = ifkv.prefill_documents(twin, DOCUMENTS, prefix=PREFIX)
    assert again[0].fingerprint != documents[0].fingerprint


def test_layers_out_of_place_are_refused() -> None:
    model: Any = tiny_model("llama", dtype=torch.float32)
    del model.model.layers[1]
    model.config.num_hidden_layers = 2
    with pytest.raises(UnsupportedModelError, match=r"layer 1 .*layer_idx 2.*layer_idx = 1"):
        ifkv.patch(model)
    model.model.layers[1].self_attn.layer_idx = 1
    with ifkv.patch(model):
        assert len(ifkv.prefill_documents(model, DOCUMENTS)[0].keys) == 2


@pytest.mark.parametrize("count", [0, -3])
def test_a_model_that_runs_no_layer_is_refused(count: int) -> None:
    model = shortened("llama", count)
    with pytest.raises(UnsupportedModelError, match=rf"num_hidden_layers is {count}.*no layer"):
        ifkv.patch(model)
