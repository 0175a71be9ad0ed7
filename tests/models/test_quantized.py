"""Models whose weights are quantized: told apart, measured by what they compute, and exact."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ifkv
from ifkv.cost import ModelShape
from ifkv.errors import FingerprintMismatchError, UnsupportedModelError
from ifkv.models.fingerprint import fingerprint
from ifkv.testing import assert_close, tiny_model

DOCUMENTS = [[3, 14, 15, 92, 6], [53, 58], [79, 32, 38]]
PROMPT = [26, 43]


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in 8 bits, and the factors of its rows."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


class PackedLinear(nn.Module):
    """As GPTQ's, AWQ's and bitsandbytes' layers: sizes in attributes, weights in other shapes."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        values, scale = rounded(linear.weight.data)
        self.register_buffer("packed", values.reshape(-1, 1))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.packed.view(self.out_features, self.in_features) * self.scale
        return functional.linear(x, weight.to(x.dtype))


class ScaledTensor(torch.Tensor):
    """As torchao's tensors: one to look at, two to keep, and few operations."""

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls: Any, values: Tensor, scale: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values: Tensor, scale: Tensor):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            x, weight, bias = args
            return functional.linear(x, weight.values * weight.scale, bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return ScaledTensor(args[0].values, args[0].scale)
        raise NotImplementedError(f"{func} of quantized weights")


def packed(linear: nn.Linear) -> nn.Module:
    return PackedLinear(linear)


def scaled(linear: nn.Linear) -> nn.Module:
    weight = ScaledTensor(*rounded(linear.weight.data))
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class HiddenLinear(PackedLinear):
    """As torch's dynamically quantized layers: weights where no parameter or buffer names them."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.hidden = (self.packed, self.scale)
        del self.packed, self.scale

    def forward(self, x: Tensor) -> Tensor:
        self.packed, self.scale = self.hidden
        return super().forward(x)


def quantized(how: Callable[[nn.Linear], nn.Module], **options: Any) -> Any:
    """A tiny model with every projection of its layers quantized."""
    model: Any = tiny_model("qwen3", num_layers=2, **options)
    for layer in model.base_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, part in list(block.named_children()):
                if isinstance(part, nn.Linear):
                    setattr(block, name, how(part))
    return model


@pytest.mark.parametrize("how", [packed, scaled])
def test_all_recomputed_equals_a_full_prefill(how: Callable[[nn.Linear], nn.Module]) -> None:
    model = quantized(how)
    with ifkv.patch(model):
        cache = ifkv.stitch(model, ifkv.prefill_documents(model, DOCUMENTS, prefix=[1, 2]))
        ids = torch.cat((cache.token_ids, torch.tensor(PROMPT)))[None]
        logits = ifkv.recompute(model, cache, range(cache.context_length), prompt_ids=PROMPT)
        assert logits is not None
        with torch.no_grad():
            truth = model(ids).logits[0, -1]
        assert_close(logits, truth, what="logits", tolerance=1e-11)


@pytest.mark.parametrize("how", [packed, scaled])
def test_shapes_are_those_of_what_is_computed(how: Callable[[nn.Linear], nn.Module]) -> None:
    model = tiny_model("qwen3", num_layers=2)
    assert ModelShape.of(quantized(how)) == ModelShape.of(model)


@pytest.mark.parametrize("how", [packed, scaled])
def test_weights_that_differ_are_told_apart(how: Callable[[nn.Linear], nn.Module]) -> None:
    model = quantized(how)
    assert fingerprint(model) == fingerprint(quantized(how))
    assert fingerprint(model) != fingerprint(quantized(how, seed=1))
    up = model.base_model.layers[1].mlp.up_proj
    for part in ("values", "scale") if how is scaled else ("packed", "scale"):
        before = fingerprint(model)
        kept: Tensor = getattr(up.weight if how is scaled else up, part)
        kept.copy_(-kept)
        assert fingerprint(model) != before


def test_a_change_while_patched_is_noticed() -> None:
    model = quantized(scaled)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, DOCUMENTS)
        values = model.base_model.layers[0].mlp.up_proj.weight.values
        values.copy_(-values)
        with pytest.raises(FingerprintMismatchError):
            ifkv.stitch(model, documents)


def test_weights_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn.*cannot be read"):
        ifkv.patch(quantized(HiddenLinear))
