"""Run rows through a patched model's decoder layers under an attention pass.

The loop calls the model's own layer modules with the keywords that upstream's forward gives them,
so upstream's code computes the layers. With its own loop a pass can stop after the deepest layer it
needs, skip the unused part of the last layer, and build no masks. The hashes in the family files
show when the upstream forward that it replaces has changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ifkv.forward.watched_pass import WatchedPass
from ifkv.models.compat import cache_keyword
from ifkv.models.decoder import DecoderView

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.forward.passes import AttentionPass
    from ifkv.forward.picture_rows import PictureRows


def embed(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """Compute the input embeddings of tokens.

    Args:
        model: A patched model.
        token_ids: Long ``[rows]``, on the model's device.

    Returns:
        ``[1, rows, hidden]``.
    """
    return DecoderView(model).embed(token_ids)


def run_layers(
    model: PreTrainedModel,
    hidden: Tensor,
    positions: Tensor,
    rotation: tuple[Tensor, Tensor],
    attention_pass: AttentionPass,
    stop: int,
    *,
    start: int = 0,
    pictures: PictureRows | None = None,
) -> Tensor:
    """Run rows through the layers from ``start`` up to, not including, ``stop``.

    Args:
        model: A patched model.
        hidden: ``[1, rows, hidden]``.
        positions: Long ``[rows]``, or ``[axes, rows]``.
        rotation: Cosines and sines that the layers apply, ``[1, rows or 1, rotary_dim]``.
        attention_pass: The pass.
        stop: The first layer not to run.
        start: The first layer to run; ``hidden`` is its input.
        pictures: The rows of pictures, whose inputs take the place of ``hidden`` in the first
            layer.

    Returns:
        The input of layer ``stop``, ``[1, rows, hidden]``.

    Raises:
        UnsupportedModelError: A layer asks for an attention that passes do not support, or does
            not call the pass.
    """
    watched = WatchedPass(attention_pass)
    if pictures is not None and start == 0:
        hidden = pictures.entering(hidden)
    for layer_idx, layer in enumerate(DecoderView(model).layers[start:stop], start):
        watched.expect(layer_idx)
        hidden = layer(hidden, **_keywords(layer, positions, rotation, watched))
        watched.check(layer)
        if pictures is not None:
            hidden = pictures.behind(hidden, layer_idx)
    return hidden


def run_attention(
    model: PreTrainedModel,
    hidden: Tensor,
    positions: Tensor,
    rotation: tuple[Tensor, Tensor],
    attention_pass: AttentionPass,
    layer_idx: int,
) -> None:
    """Run only the attention block of one layer, for its effect on the pass.

    In its deepest layer a pass needs keys and values, or scores, and not the layer's output. So the
    MLP, which is the larger part, does not run.

    Args:
        model: A patched model.
        hidden: Input of the layer, ``[1, rows, hidden]``.
        positions: As in `run_layers`.
        rotation: As in `run_layers`.
        attention_pass: The pass.
        layer_idx: The layer.

    Raises:
        UnsupportedModelError: As in `run_layers`.
    """
    view = DecoderView(model)
    layer = view.layers[layer_idx]
    watched = WatchedPass(attention_pass)
    watched.expect(layer_idx)
    layer.self_attn(
        hidden_states=view.attention_input(layer, hidden),
        **_keywords(layer.self_attn, positions, rotation, watched),
    )
    watched.check(layer)


def row_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Compute the logits of every row.

    Args:
        model: A patched model.
        hidden: Output of the last layer, ``[1, rows, hidden]``.

    Returns:
        ``[rows, vocabulary]``.
    """
    return DecoderView(model).logits(hidden)


def _keywords(
    module: nn.Module,
    positions: Tensor,
    rotation: tuple[Tensor, Tensor],
    attention_pass: AttentionPass,
) -> dict[str, Any]:
    return cache_keyword(module, attention_pass) | {
        "attention_mask": None,
        "position_ids": positions[..., None, :],
        "use_cache": True,
        "position_embeddings": rotation,
        "ifkv_pass": attention_pass,
    }
