"""Experts of a decoder layer: how many there are, how many a row uses, and how large they are."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ifkv.models.decoder import DecoderView

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Experts:
    """Experts of one layer.

    Attributes:
        parameters: Elements of one expert's weights.
        number: Experts of the layer.
        used: Experts that a row goes to.
    """

    parameters: int
    number: int
    used: int


def experts_of(layer: nn.Module, config: Any) -> Experts | None:
    """Return the experts of a decoder layer; None if it has none.

    Upstream keeps the weights of a layer's experts in parameters of three dimensions, of which the
    first counts the experts.

    Args:
        layer: The layer.
        config: The config that says how many experts a row uses.
    """
    stacked = [weight for weight in layer.parameters() if weight.ndim == 3]
    if not stacked:
        return None
    number = stacked[0].shape[0]
    used = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None)
    return Experts(sum(weight.numel() for weight in stacked) // number, number, used or number)


def has_experts(model: PreTrainedModel) -> bool:
    """True if some layer sends each row to some of several experts."""
    layers = DecoderView(model).layers
    return any(weight.ndim == 3 for layer in layers for weight in layer.parameters())
