"""Products and norms of the dense transformer, written from the formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def linear(module: Any, x: Tensor) -> Tensor:
    """Return x Wᵀ + b."""
    y: Tensor = x @ module.weight.T
    return y if module.bias is None else y + module.bias


def norm(module: Any, x: Tensor) -> Tensor:
    """Return x normalised as the module does: by its mean square, or by mean and variance."""
    if hasattr(module, "variance_epsilon") or hasattr(module, "_norm"):
        return rms_norm(module, x)
    return layer_norm(module, x)


def rms_norm(module: Any, x: Tensor) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) · w, with upstream's detour through float32."""
    wide = x.to(getattr(module, "compute_dtype", torch.float32))
    gemma = hasattr(module, "_norm")  # its weights are offsets from 1, and multiply before rounding
    eps = module.eps if gemma else module.variance_epsilon
    scaled = wide * torch.rsqrt((wide**2).mean(-1, keepdim=True) + eps)
    weight: Tensor = module.weight
    if gemma:
        return (scaled * (1 + weight.float())).to(x.dtype)
    return (weight + getattr(module, "offset", 0.0)) * scaled.to(x.dtype)


def layer_norm(module: Any, x: Tensor) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) · w + b; OLMo's has no weights and is in float32."""
    shape = x.shape[-1:]
    if hasattr(module, "weight"):
        return torch.nn.functional.layer_norm(x, shape, module.weight, module.bias, module.eps)
    wide = x.to(getattr(module, "compute_dtype", torch.float32))
    return torch.nn.functional.layer_norm(wide, shape, eps=1e-5).to(x.dtype)
