"""The decoder layers that a model runs: the one place that says which those are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that the model's own forward runs, in order.

    Upstream runs ``layers[: config.num_hidden_layers]`` and reads the count at every forward: a
    model whose count has been lowered keeps its other layers and does not run them.

    Args:
        model: A causal language model.
    """
    base: Any = model.base_model
    return list(base.layers[: base.config.num_hidden_layers])


def num_layers(model: PreTrainedModel) -> int:
    """How many decoder layers the model runs."""
    base: Any = model.base_model
    return len(range(len(base.layers))[: base.config.num_hidden_layers])


def read_by_every_forward(model: PreTrainedModel) -> tuple[object, ...]:
    """What upstream reads anew each time, beside weights, and so can change under a patch.

    That is the count of layers, the config's sliding window, and each attention's own window and
    factor on the logits.
    """
    base: Any = model.base_model
    config = base.config
    read: list[object] = [num_layers(model), getattr(config, "sliding_window", None)]
    for layer in base.layers[: config.num_hidden_layers]:
        attention = getattr(layer, "self_attn", None)
        read += [getattr(attention, name, None) for name in ("scaling", "sliding_window")]
    return tuple(read)
