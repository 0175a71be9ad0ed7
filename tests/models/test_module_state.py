"""What layers keep beside their weights is told apart, too, wherever they keep it."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ifkv
from ifkv.errors import FingerprintMismatchError
from ifkv.models.fingerprint import fingerprint
from ifkv.store import MemoryStore
from ifkv.testing import assert_close, tiny_model, tiny_tokenizer
from quantized_layers import EightBitLinear, FourBitLinear, MetaLinear, with_layers

TOKENIZER = tiny_tokenizer()
TEXTS = ["The lamp is red.", "The door is green."]
DOCUMENTS = [[3, 14, 15, 92, 6], [53, 58], [79, 32, 38]]
LAYERS = [FourBitLinear, EightBitLinear, MetaLinear]


def quantized(kind: Any, factor: float = 1.0) -> Any:
    model = tiny_model("llama", num_layers=2, vocab_size=len(TOKENIZER))
    return with_layers(model, functools.partial(kind, factor=factor))


def up_of(model: Any) -> Any:
    return model.base_model.layers[1].mlp.up_proj


@pytest.mark.parametrize("kind", LAYERS)
def test_equal_codes_with_other_scales_share_no_documents(kind: Any) -> None:
    """Of three models over one store the first two are equal, and the third has other scales."""
    store, prefilled = MemoryStore(), []
    for factor in (1.0, 1.0, 1.5):
        model = quantized(kind, factor)
        session = ifkv.Session(model, TOKENIZER, store=store)
        session.add(TEXTS)
        prefilled.append(session.prefilled)
        answer = session.ask("Which?", ratio=1, max_new_tokens=1)
        prompt = torch.tensor(session.format.prompt_ids("Which?"))
        with torch.no_grad():
            truth = model(torch.cat((session.context_ids(), prompt))[None]).logits[0, -1]
        assert_close(answer.first_logits, truth, what="logits", tolerance=1e-6)
    assert prefilled == [2, 0, 2]


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_that_prepare_themselves_at_the_first_forward_answer(kind: Any) -> None:
    model = quantized(kind)
    with ifkv.patch(model) as handle:
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=[1, 2])
        cache = ifkv.stitch(model, documents)
        ifkv.recompute(model, cache, [8, 9], prompt_ids=[7])
        assert ifkv.generate(model, cache, [7], max_new_tokens=2).shape[1] <= 3
        assert documents[0].fingerprint == handle.fingerprints.of(model) == fingerprint(model)


def test_a_settled_model_is_fingerprinted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(model: Any) -> str:
        made.append(fingerprint(model))
        return made[-1]

    monkeypatch.setattr("ifkv.models.fingerprint.fingerprint", counted)
    session = ifkv.Session(quantized(EightBitLinear), TOKENIZER, store=MemoryStore())
    session.add(TEXTS)
    for _ in range(2):
        session.ask("Which?", ratio=0.5, max_new_tokens=2)
    assert len(made) == 1


def state_of_four_bits(up: Any) -> Any:
    return up.weight.quant_state


CHANGES: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "absmax": (FourBitLinear, lambda up: state_of_four_bits(up).absmax.mul_(2)),
    "code": (FourBitLinear, lambda up: state_of_four_bits(up).code.mul_(2)),
    "offset": (FourBitLinear, lambda up: state_of_four_bits(up).offset.mul_(2)),
    "block size": (FourBitLinear, lambda up: vars(up.weight.quant_state).update(blocksize=16)),
    "kind": (FourBitLinear, lambda up: vars(up.weight.quant_state).update(quant_type="fp4")),
    "nested": (FourBitLinear, lambda up: state_of_four_bits(up).state2.absmax.mul_(2)),
    "nested size": (FourBitLinear, lambda up: vars(up.quant_state.state2).update(blocksize=64)),
    "8 bits": (EightBitLinear, lambda up: up.weight.SCB.mul_(2)),
    "threshold": (EightBitLinear, lambda up: vars(up.state).update(threshold=6.0)),
    "scale": (MetaLinear, lambda up: up.meta["scale"].mul_(2)),
    "zero": (MetaLinear, lambda up: up.meta["zero"].add_(2)),
    "bits": (MetaLinear, lambda up: up.meta.update(nbits=4)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_part_of_a_quantization_counts(name: str) -> None:
    kind, change = CHANGES[name]
    model = quantized(kind)
    before = fingerprint(model)
    assert fingerprint(quantized(kind)) == before
    change(up_of(model))
    assert fingerprint(model) != before


def test_scales_count_wherever_the_first_forward_moves_them() -> None:
    model = quantized(EightBitLinear)
    before = fingerprint(model)
    model(torch.tensor([[1, 2]]))
    assert up_of(model).weight.SCB is None
    assert fingerprint(model) == before
    up_of(model).state.SCB.mul_(2)
    assert fingerprint(model) != before


def test_a_state_that_the_weight_has_lost_counts_in_its_layer() -> None:
    """As with bitsandbytes under FSDP, whose layers then put it back."""
    model = quantized(FourBitLinear)
    up_of(model).weight.quant_state = None
    before = fingerprint(model)
    up_of(model).quant_state.absmax.mul_(2)
    assert fingerprint(model) != before


NOTICED: dict[str, tuple[Any, Callable[[Any], object]]] = {
    "4 bits": (FourBitLinear, lambda up: state_of_four_bits(up).absmax.mul_(2)),
    "8 bits": (EightBitLinear, lambda up: up.state.SCB.mul_(2)),
    "other scales": (MetaLinear, lambda up: up.meta.update(scale=up.meta["scale"] * 2)),
}


@pytest.mark.parametrize("name", NOTICED)
def test_scales_that_change_while_patched_are_noticed(name: str) -> None:
    kind, change = NOTICED[name]
    model = quantized(kind)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS)
        change(up_of(model))
        with pytest.raises(FingerprintMismatchError):
            ifkv.stitch(model, documents)


class LowRank(nn.Module):
    """A LoRA by hand, as people write them."""

    def __init__(self, linear: nn.Linear, scaling: float = 1.0, seed: int = 0):
        super().__init__()
        self.linear, self.scaling, self.enabled, self.alpha = linear, scaling, True, 4
        draw = torch.Generator().manual_seed(seed)
        self.down = torch.randn(linear.in_features, 2, generator=draw).double()
        self.up = torch.randn(2, linear.out_features, generator=draw).double()
        self._calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self._calls += 1
        out: Tensor = self.linear(x)
        return out + x @ self.down @ self.up * self.scaling if self.enabled else out


class OtherRank(LowRank):
    """The same state, but another class."""


def adapted(make: Callable[[nn.Linear], nn.Module]) -> Any:
    return with_layers(tiny_model("llama", num_layers=2), make)


def test_layers_of_one_s_own_are_told_apart() -> None:
    ways: list[Callable[[nn.Linear], nn.Module]] = [
        LowRank,
        OtherRank,
        functools.partial(LowRank, scaling=2.0),
        functools.partial(LowRank, seed=1),
        lambda linear: linear,
    ]
    found = [fingerprint(adapted(make)) for make in ways]
    assert len(set(found)) == len(ways)
    assert found[0] == fingerprint(adapted(LowRank))


SWITCHES: dict[str, Callable[[Any], object]] = {
    "a factor": lambda up: setattr(up, "scaling", 0.0),
    "a whole number": lambda up: setattr(up, "alpha", 5),
    "a switch": lambda up: setattr(up, "enabled", False),
    "a tensor": lambda up: setattr(up, "up", up.up * 2),
    "a tensor in place": lambda up: up.up.mul_(2),
    "the class": lambda up: setattr(up, "__class__", OtherRank),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_under_a_patch_is_noticed(name: str) -> None:
    model = adapted(LowRank)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS)
        assert ifkv.stitch(model, documents).context_length == 10, "counting calls is no change"
        SWITCHES[name](up_of(model))
        with pytest.raises(FingerprintMismatchError):
            ifkv.stitch(model, documents)


def test_a_buffer_that_changes_under_a_patch_is_noticed() -> None:
    model: Any = tiny_model("llama", num_layers=2)
    up_of(model).register_buffer("scales", torch.ones(4))
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS)
        up_of(model).scales.mul_(2)
        with pytest.raises(FingerprintMismatchError):
            ifkv.stitch(model, documents)


def test_a_number_of_a_module_of_upstream_counts() -> None:
    model: Any = tiny_model("llama")
    before = fingerprint(model)
    model.base_model.layers[1].self_attn.scaling *= 2
    assert fingerprint(model) != before


def test_a_forward_put_into_a_class_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    before = fingerprint(model)
    kind = type(model.base_model.layers[0].mlp)
    monkeypatch.setattr(kind, "forward", lambda self, x: x)
    assert fingerprint(model) != before


def test_room_for_intermediate_results_is_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of libraries that quantize keep such in plain tensors, with whatever was there."""
    model = adapted(LowRank)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with ifkv.patch(model) as handle:
        before = handle.fingerprints.of(model)
        up_of(model).up = torch.zeros(5)
        up_of(model).handle = 0x7F00_1234_5678  # an address
        monkeypatch.setattr(
            "ifkv.models.fingerprint.settle", lambda _: pytest.fail("taken for a change")
        )
        assert handle.fingerprints.of(model) == fingerprint(model) == before
