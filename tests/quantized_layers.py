"""Stand-ins for layers of bitsandbytes and HQQ: they keep their scales where those do."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CODE = torch.linspace(-1, 1, 16)
BLOCK = 8


class FourBitWeight(nn.Parameter):
    """As ``Params4bit``: codes to look at, and a ``quant_state`` to read them by."""

    quant_state: Any

    def __new__(cls, codes: Tensor, quant_state: Any) -> FourBitWeight:
        self: FourBitWeight = torch.Tensor._make_subclass(cls, codes, False)
        self.quant_state = quant_state
        return self


class FourBitLinear(nn.Module):
    """As ``Linear4bit`` with nested scales, which packs its weights anew at the first forward.

    Rows of ``block`` codes share a scale, ``offset + absmax * state2.absmax``.
    """

    def __init__(self, linear: nn.Linear, factor: float = 1.0):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        blocks = linear.weight.data.reshape(-1, BLOCK)
        largest = blocks.abs().amax(dim=1, keepdim=True)
        codes = (blocks / largest * 7.5 + 7.5).round().to(torch.uint8)
        offset = largest.mean()
        state = SimpleNamespace(
            absmax=largest - offset,
            code=CODE.to(linear.weight.dtype),
            blocksize=BLOCK,
            quant_type="nf4",
            shape=linear.weight.shape,
            offset=offset * factor,
            state2=SimpleNamespace(absmax=torch.full((1,), factor).to(offset), blocksize=256),
            packed=False,
        )
        self.weight = FourBitWeight(codes, state)
        self.quant_state = state
        self.compute_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        state = self.weight.quant_state
        if not state.packed:
            self.weight.data = self.weight.data.flip(0).contiguous()
            state.absmax, state.packed = state.absmax * state.state2.absmax + state.offset, True
            del state.state2
            self.compute_dtype = x.dtype
        weight = state.code[self.weight.data.flip(0).long()] * state.absmax
        return functional.linear(x, weight.reshape(state.shape).to(x.dtype))


class EightBitWeight(nn.Parameter):
    """As ``Int8Params``: the scales of its rows are in ``SCB``, until the first forward."""

    CB: Tensor | None
    SCB: Tensor | None

    def __new__(cls, values: Tensor, scales: Tensor) -> EightBitWeight:
        self: EightBitWeight = torch.Tensor._make_subclass(cls, values, False)
        self.CB, self.SCB = values, scales
        return self


class EightBitLinear(nn.Module):
    """As ``Linear8bitLt``: its ``state`` takes the scales, and remembers the last forward."""

    def __init__(self, linear: nn.Linear, factor: float = 1.0):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.data.abs().amax(dim=1) / 127
        values = (linear.weight.data / scales[:, None]).round().to(torch.int8)
        self.weight = EightBitWeight(values, scales * factor)
        self.state: Any = SimpleNamespace(CB=None, SCB=None, threshold=0.0, outliers=None)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.CB is not None:
            self.state.CB, self.state.SCB = self.weight.CB, self.weight.SCB
            self.weight.CB = self.weight.SCB = None
        self.state.outliers = x.amax()
        self.weight.data = self.state.CB
        return functional.linear(x, self.weight.to(x.dtype) * self.state.SCB[:, None].to(x.dtype))


class MetaLinear(nn.Module):
    """As HQQ's: scales and zero points in a dictionary."""

    def __init__(self, linear: nn.Linear, factor: float = 1.0):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.data.abs().amax(dim=1, keepdim=True) / 127
        values = (linear.weight.data / scales).round().to(torch.int8)
        self.W_q = nn.Parameter(values, requires_grad=False)
        self.meta = {"scale": scales * factor, "zero": torch.zeros_like(scales), "nbits": 8}

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.W_q.to(x.dtype) - self.meta["zero"]) * self.meta["scale"]
        return functional.linear(x, weight.to(x.dtype))


def with_layers(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    """A model with every projection of its layers replaced."""
    for layer in model.base_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, part in list(block.named_children()):
                if isinstance(part, nn.Linear):
                    setattr(block, name, make(part))
    return model
