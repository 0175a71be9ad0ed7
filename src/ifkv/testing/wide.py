"""Modules that compute in float64 where upstream's round to float32, for sharp comparisons.

Rounding is a step function: mostly it hides differences of 1e-16, and now and then it turns one
into 1e-8. A float32 product can also depend on how many rows are multiplied together. Without such
steps, float64 comparisons at 1e-12 are both safe and sharp. `compute_dtype` tells the oracle which
of the two a module does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class WideRMSNorm(nn.Module):
    """RMS norm in the dtype of its input.

    Args:
        weight: The norm's weight.
        eps: Added to the mean square.
        offset: Added to the weight; 1 in Gemma.
    """

    compute_dtype = torch.float64

    def __init__(self, weight: nn.Parameter, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps
        self.offset = offset

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last axis. Shape: `[..., n]` to `[..., n]`."""
        variance = hidden_states.square().mean(-1, keepdim=True)
        scaled = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight + self.offset if self.offset else self.weight) * scaled


class WideLayerNorm(nn.Module):
    """Layer norm without weights, in the dtype of its input."""

    compute_dtype = torch.float64

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last axis. Shape: `[..., n]` to `[..., n]`."""
        return nn.functional.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-5)


class WideRouter(nn.Module):
    """Router by sigmoids in groups (arXiv 2412.19437, section 2.1.2), in the dtype of its input.

    Args:
        router: Upstream's router.
        routed: True if the module that holds it chooses the experts, as in older releases.
        config: The model's config.
    """

    compute_dtype = torch.float64

    def __init__(self, router: Any, routed: bool, config: Any) -> None:
        super().__init__()
        self.weight = router.weight
        self.register_buffer("e_score_correction_bias", router.e_score_correction_bias.double())
        self.config, self._routed = config, routed

    def forward(self, hidden_states: Tensor) -> Any:
        """Return the logits; with weights and numbers of the chosen experts unless `routed`."""
        logits = hidden_states.flatten(0, -2) @ self.weight.T
        return logits if self._routed else (logits, *group_choice(self, self.config, logits))


class WideSigmoidRouter(nn.Module):
    """Router by sigmoids without groups, in the dtype of its input.

    Args:
        router: Upstream's router, which is given the bias at every call.
    """

    compute_dtype = torch.float64

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.weight, self.top_k = router.weight, router.top_k

    def forward(self, hidden_states: Tensor, e_score_correction_bias: Tensor) -> Any:
        """Return the logits, and weights and numbers of the chosen experts."""
        logits = hidden_states @ self.weight.T
        scores = logits.sigmoid()
        chosen = (scores + e_score_correction_bias).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        return logits, weights / weights.sum(-1, keepdim=True), chosen


def group_choice(router: Any, config: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Choose experts by sigmoids, within the groups whose two best are highest.

    Args:
        router: Holds ``e_score_correction_bias``, which counts for the choice alone.
        config: The model's config.
        logits: Of the experts, ``[rows, experts]``.

    Returns:
        Weights and numbers of the chosen experts, both ``[rows, used]``.
    """
    scores = logits.sigmoid()
    wanted = (scores + router.e_score_correction_bias).unflatten(-1, (config.n_group, -1))
    best = wanted.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
    open_groups = torch.zeros_like(wanted[..., 0], dtype=torch.bool).scatter(-1, best, True)
    wanted = wanted.masked_fill(~open_groups[..., None], float("-inf")).flatten(-2)
    chosen = wanted.topk(config.num_experts_per_tok, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * config.routed_scaling_factor, chosen


def widen_norms(model: nn.Module) -> None:
    """Replace norms and routers of a float64 model that round to float32, sharing their weights."""
    config: Any = getattr(model, "config", None)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            part: Any = child
            kind = type(part).__name__
            if hasattr(part, "compute_dtype"):
                continue
            if kind.startswith("Gemma") and kind.endswith("RMSNorm"):
                setattr(parent, name, WideRMSNorm(part.weight, part.eps, 1.0))
            elif kind.endswith("RMSNorm"):
                setattr(parent, name, WideRMSNorm(part.weight, part.variance_epsilon))
            elif kind == "OlmoLayerNorm":
                setattr(parent, name, WideLayerNorm())
            elif kind == "MiniMaxM2TopKRouter":
                setattr(parent, name, WideSigmoidRouter(part))
            elif kind.endswith("TopkRouter") and hasattr(part, "e_score_correction_bias"):
                routed = hasattr(parent, "route_tokens_to_experts")
                part.weight.data = part.weight.data.double()
                setattr(parent, name, WideRouter(part, routed, config))
