"""The fingerprint: equal where caches are, different where anything that makes them is."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import ifkv
from ifkv.errors import FingerprintMismatchError
from ifkv.models.fingerprint import SAMPLES, _places, fingerprint
from ifkv.models.weights import _trees
from ifkv.patching import handle_of
from ifkv.testing import tiny_model

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def matrix(model: PreTrainedModel, name: str, layer: int = 0) -> torch.nn.Parameter:
    block: Any = model.base_model.layers[layer]  # type: ignore[union-attr, index]
    owner = block.self_attn if name[0] in "qkvo" else block.mlp
    weight: torch.nn.Parameter = getattr(owner, name).weight
    return weight


def low_rank(like: torch.Tensor, scale: float, sparse: bool) -> torch.Tensor:
    """A LoRA's product B A of rank 2; sparse: A reads a quarter of the inputs only."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = like.shape
    left = torch.randn(rows, 2, generator=generator)
    right = torch.randn(2, columns, generator=generator)
    if sparse:
        right[:, : columns - columns // 4] = 0
    return (scale * left @ right).to(like.dtype)


def test_equal_for_equal_models_patched_or_not_and_in_another_process() -> None:
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    wanted = fingerprint(model)
    assert fingerprint(tiny_model("qwen3", dtype=torch.bfloat16)) == wanted
    with ifkv.patch(model) as handle:
        assert fingerprint(model) == wanted == handle.fingerprints.of(model)
        ifkv.prefill_documents(model, [[1, 2, 3]])
        assert fingerprint(model) == wanted
    program = (
        "import torch; from ifkv.models.fingerprint import fingerprint; from ifkv.testing import "
        "tiny_model; print(fingerprint(tiny_model('qwen3', dtype=torch.bfloat16)))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert out.stdout.decode().strip() == wanted


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("merge", ["data", "in-place", "assign"])
def test_a_merged_lora_is_noticed(name: str, sparse: bool, merge: str) -> None:
    """In one matrix of one layer, at a hundredth of its size, in bfloat16, however merged."""
    model = tiny_model(
        "llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=96, num_layers=2
    )
    with ifkv.patch(model) as handle:
        before = handle.fingerprints.of(model)
        document = ifkv.prefill_documents(model, [[1, 2, 3]])[0]
        weight = matrix(model, name, layer=1)
        delta = low_rank(weight, 0.01, sparse)
        if merge == "data":  # as peft does: torch counts no change
            weight.data += delta
        elif merge == "in-place":
            with torch.no_grad():
                weight.add_(delta)
        else:
            weight.data = weight.data + delta
        assert fingerprint(model) != before
        if merge != "data" or not sparse:
            assert handle.fingerprints.of(model) != before
            with pytest.raises(FingerprintMismatchError):
                ifkv.stitch(model, [document])


@pytest.mark.parametrize(
    "change",
    [
        dict(dtype=torch.float32),
        dict(seed=1),
        dict(rope="llama3"),
        dict(rope="yarn"),
        dict(head_dim=16),
        dict(num_layers=2),
        dict(rms_norm_eps=1e-3),
        dict(rope={"rope_type": "default", "rope_theta": 20000.0}),
    ],
    ids=str,
)
def test_whatever_changes_rows_changes_it(change: dict[str, Any]) -> None:
    assert fingerprint(tiny_model("llama", **change)) != fingerprint(tiny_model("llama"))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: setattr(config, "use_cache", False),
        lambda config: setattr(config, "eos_token_id", 7),
        lambda config: setattr(config, "name_or_path", "elsewhere"),
    ],
)
def test_what_does_not_change_rows_does_not(change: Callable[[Any], None]) -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    change(model.config)
    assert fingerprint(model) == before


@pytest.mark.parametrize("numel", [SAMPLES + 1, 4096 * 4096, 128256 * 4096, 10**11])
def test_samples_are_spread_over_rows_and_columns(numel: int) -> None:
    places = _places(numel)
    assert len(set(places.tolist())) == SAMPLES
    assert places.min() >= 0
    assert places.max() < numel
    if numel > 2**20:
        columns = places % 4096
        assert len(set((columns // 64).tolist())) == 64  # every 64 columns are looked into
        assert len(set((places * 64 // numel).tolist())) == 64


def test_a_reused_fingerprint_costs_little_and_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with ifkv.patch(model):
        handle = handle_of(model)
        first = handle.fingerprints.of(model)
        monkeypatch.setattr(
            "ifkv.models.fingerprint.fingerprint", lambda _: pytest.fail("made again")
        )
        assert handle.fingerprints.of(model) == first


def test_the_head_does_not_count_unless_it_is_tied_to_the_embeddings() -> None:
    """Keys and values do not depend on it: documents outlive a head that is trained."""
    for tied in (False, True):
        model = tiny_model("llama", tie_word_embeddings=tied)
        with ifkv.patch(model):
            document = ifkv.prefill_documents(model, [[1, 2, 3]])[0]
            before = fingerprint(model)
            model.get_output_embeddings().weight.mul_(1.5)
            assert (fingerprint(model) == before) == (not tied)
            if tied:
                with pytest.raises(FingerprintMismatchError):
                    ifkv.stitch(model, [document])
            else:
                assert ifkv.stitch(model, [document]).context_length == 3


def _hang_below_a_layer(layer: Any) -> None:
    layer.mlp.down_proj.add_module("more", torch.nn.Linear(2, 2, bias=False).double())


def _put_another_in_its_place(layer: Any) -> None:
    old = layer.mlp.down_proj
    layer.mlp.down_proj = torch.nn.Linear(old.in_features, old.out_features, bias=False).double()


def _give_it_another_parameter(layer: Any) -> None:
    layer.mlp.down_proj.bias = torch.nn.Parameter(torch.ones(32).double())


@pytest.mark.parametrize(
    "change", [_hang_below_a_layer, _put_another_in_its_place, _give_it_another_parameter]
)
def test_a_module_that_was_not_there_before_is_noticed(change: Callable[[Any], None]) -> None:
    model: Any = tiny_model("llama")
    with ifkv.patch(model) as handle:
        before = handle.fingerprints.of(model, sample=False)
        assert handle.fingerprints.of(model, sample=False) == before
        change(model.base_model.layers[1])
        assert handle.fingerprints.of(model, sample=False) != before


def test_what_is_kept_of_a_model_keeps_no_weights() -> None:
    model: Any = tiny_model("llama")
    handle = ifkv.patch(model)
    handle.fingerprints.of(model)
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    kept_for_now = len(_trees)
    del model
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    assert len(_trees) < kept_for_now
    assert "undone" in repr(handle)
