"""MLPs and mixtures of experts of the dense transformer, written from the formulas.

As in `dense`, the weights are read and no upstream forward runs. Shapes: R rows, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ifkv.testing.dense_norms import linear, rms_norm

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


def feed_forward(config: Any, module: Any, x: Tensor) -> Tensor:
    """Return what the MLP of a layer adds, or its experts. Shapes: `[R, hidden]` twice."""
    if hasattr(module, "experts"):
        return mixture(config, module, x)
    return mlp(_ACTIVATIONS[config.hidden_act], module, x)


def mlp(activation: Callable[[Tensor], Tensor], module: Any, x: Tensor) -> Tensor:
    """Return down(act(gate(x)) · up(x)), or down(act(up(x))) where there is no gate."""
    if hasattr(module, "c_fc"):  # Starcoder 2
        return linear(module.c_proj, activation(linear(module.c_fc, x)))
    if hasattr(module, "gate_up_proj"):  # Phi-3: one matrix, gate first
        gate, up = linear(module.gate_up_proj, x).chunk(2, dim=-1)
        inner = activation(gate) * up
    elif hasattr(module, "gate_proj"):
        inner = activation(linear(module.gate_proj, x)) * linear(module.up_proj, x)
    else:  # Arcee, Jais 2
        inner = activation(linear(module.up_proj, x))
    if hasattr(module, "ffn_sub_norm"):  # BitNet
        inner = rms_norm(module.ffn_sub_norm, inner)
    return linear(module.down_proj, inner)


def mixture(config: Any, block: Any, x: Tensor) -> Tensor:
    """Return the sum over the experts of a row, by their weights, and the shared expert."""
    weights, chosen = routes(config, block, x)
    activation = F.silu if config.model_type == "aria_text" else _ACTIVATIONS[config.hidden_act]
    total = torch.zeros_like(x)
    for expert, (first, last) in enumerate(zip(*_matrices(config, block.experts), strict=True)):
        gate, up = (x @ first.T).chunk(2, dim=-1)  # of every row, chosen or not
        weight = torch.where(chosen == expert, weights, 0).sum(-1, keepdim=True)
        total = total + (((activation(gate) * up) @ last.T) * weight).to(x.dtype)
    if hasattr(block, "shared_experts"):
        total = total + mlp(_ACTIVATIONS[config.hidden_act], block.shared_experts, x)
    if hasattr(block, "shared_expert"):  # Qwen2-MoE
        share = torch.sigmoid(linear(block.shared_expert_gate, x))
        total = total + share * mlp(_ACTIVATIONS[config.hidden_act], block.shared_expert, x)
    return total


def _matrices(config: Any, experts: Any) -> tuple[Tensor, Tensor]:
    """Return gate and up together `[E, 2 · inner, hidden]`, and down `[E, hidden, inner]`."""
    if config.model_type == "aria_text":  # which keeps them transposed
        old = hasattr(experts, "fc1")
        first = experts.fc1.weight if old else experts.gate_up_proj
        last = experts.fc2.weight if old else experts.down_proj
        return first.transpose(1, 2), last.transpose(1, 2)
    return experts.gate_up_proj, experts.down_proj


def routes(config: Any, block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of the experts that each row goes to, and their numbers, both `[R, k]`."""
    kind = config.model_type
    if kind == "aria_text":  # softmax over the chosen
        highest, chosen = (x @ block.router.weight.T).topk(config.moe_topk, dim=-1)
        return highest.softmax(-1), chosen
    router, used = block.gate, config.num_experts_per_tok
    wide = getattr(router, "compute_dtype", torch.float32)
    if kind in ("dots1", "glm4_moe", "solar_open"):  # DeepSeek-V3: sigmoids, in groups
        scores = (x.to(wide) @ router.weight.to(wide).T).sigmoid()
        wanted = scores + router.e_score_correction_bias
        groups = wanted.unflatten(-1, (config.n_group, -1))
        worth = groups.topk(2, dim=-1).values.sum(-1)
        least = worth.topk(config.topk_group, dim=-1).values[:, -1:]
        closed = (worth < least)[..., None].expand_as(groups).flatten(1)
        chosen = wanted.masked_fill(closed, float("-inf")).topk(used, dim=-1).indices
    elif kind == "minimax_m2":  # sigmoids
        scores = (x @ router.weight.T).to(wide).sigmoid()
        chosen = (scores + block.e_score_correction_bias).topk(used, dim=-1).indices
    else:  # softmax over all
        logits = x @ router.weight.T
        scores = logits.float().softmax(-1)
        chosen = scores.topk(used, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if getattr(config, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * getattr(config, "routed_scaling_factor", 1.0), chosen
