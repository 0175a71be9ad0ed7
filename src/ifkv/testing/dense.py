"""Dense transformer written from the formulas: one forward pass, made to be read.

The pass reads the weights of a Hugging Face model of one of `tiny_configs.FAMILIES`, or of the
decoder in a Qwen-VL model, and nothing else: no upstream forward runs, no cache object, no
attention kernel, no code of this library. `dense_rows` sends rows through all layers under an
explicit boolean mask over all slots. `oracle` says which rows, positions and mask make up the
method.

A *slot* is an index in the cache, a *position* is the number RoPE rotates by. Keys are kept before
RoPE (and after qk-norm). Shapes: L layers, H heads, H_kv kv heads, D head_dim, N slots, R rows,
V vocabulary.

Arithmetic runs in the model's dtype with upstream's casts. RMS norms, cosines and sines are
computed in float32 (norms and routers in float64 where the module says so, see `wide`), softmax in
float32 or wider. MLPs and experts are in `dense_mlp`, norms in `dense_norms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ifkv.testing.dense_mlp import feed_forward
from ifkv.testing.dense_norms import linear, norm, rms_norm


@dataclass(frozen=True)
class DenseTrace:
    """Trace of one dense pass: what its rows computed.

    Attributes:
        keys_before_rope: Keys of all slots after the pass, `[L, H_kv, N, D]`.
        keys: The same keys after RoPE at the slots' positions.
        values: Values of all slots after the pass, `[L, H_kv, N, D]`.
        logits: Next-token logits of the rows, `[R, V]`.
        attention: Attention weights of the rows, one `[H, R, N]` a layer.
    """

    keys_before_rope: Tensor
    keys: Tensor
    values: Tensor
    logits: Tensor
    attention: tuple[Tensor, ...]


# --- the parts of a layer -----------------------------------------------------------------------


def _rotate(model: Any, x: Tensor, positions: Tensor) -> Tensor:
    """Rotate pair (i, i + d/2) of the first d = 2·len(inv_freq) channels by position · inv_freq[i].

    Shapes: x `[heads, R, D]`, positions `[R]`, or `[3, R]` (time, row, column) with M-RoPE.
    """
    rotary = decoder(model).rotary_emb
    if positions.ndim == 1:
        placed = positions[:, None].expand(-1, len(rotary.inv_freq))
    else:
        axes = _axes(model.config.text_config.rope_parameters, len(rotary.inv_freq))
        placed = torch.stack([positions[axis] for axis in axes], dim=1)
    angle = placed.float() * rotary.inv_freq.float()[None, :]  # [R, d/2], in float32
    cos = (angle.cos() * rotary.attention_scaling).to(x.dtype)
    sin = (angle.sin() * rotary.attention_scaling).to(x.dtype)
    half = angle.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _axes(parameters: dict[str, Any], count: int) -> list[int]:
    """Return the axis of each frequency: time 0, row 1, column 2."""
    sections = parameters["mrope_section"]
    if parameters.get("mrope_interleaved"):  # Qwen3-VL: time, row, column, time, row, column, ...
        return [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(count)]
    return [axis for axis, section in enumerate(sections) for _ in range(section)]


def decoder(model: Any) -> Any:
    """Return the module with embeddings, layers, rotary embedding and final norm."""
    return getattr(model.model, "language_model", model.model)


def _queries_keys_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project `[R, hidden]` to q `[H, R, D]`, k and v `[H_kv, R, D]`, with qk-norm, before RoPE."""
    if hasattr(attention, "qkv_proj"):  # Phi-3: one matrix, queries first, then keys, then values
        config, width = attention.config, attention.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        sizes = [heads * width, kv_heads * width, kv_heads * width]
        parts = list(linear(attention.qkv_proj, x).split(sizes, dim=-1))
    else:
        parts = [linear(p, x) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    if (limit := getattr(attention.config, "clip_qkv", None)) is not None:  # OLMo
        parts = [part.clamp(-limit, limit) for part in parts]
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    for index, each in enumerate(norms):
        if each is not None and each.weight.numel() == parts[index].shape[-1]:  # over all heads
            parts[index], norms[index] = rms_norm(each, parts[index]), None
    q, k, v = (part.unflatten(-1, (-1, attention.head_dim)).transpose(0, 1) for part in parts)
    q, k = (x if each is None else rms_norm(each, x) for x, each in zip((q, k), norms, strict=True))
    return q, k, v


def _growth(config: Any, positions: Tensor) -> Tensor | None:
    """Return the factor of queries at these positions; None if they have none.

    Ministral 3: 1 + β · log(1 + floor(position / original length)).
    """
    beta = config.rope_parameters.get("llama_4_scaling_beta")
    if beta is None:
        return None
    steps = torch.floor(positions / config.rope_parameters["original_max_position_embeddings"])
    factor: Tensor = 1 + beta * torch.log(1 + steps)
    return factor


def _norm_of(layer: Any, *names: str) -> Any:
    """Return the layer's norm, by the first of the names that it has; Apertus has its own."""
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def _window(attention: Any) -> int | None:
    """Return the sliding window of this layer: how many positions a token sees, itself included."""
    config = attention.config
    if hasattr(attention, "sliding_window"):  # Qwen: layer by layer
        window = attention.sliding_window
    else:  # Mistral, Phi-3: all layers or none. Llama has no such field
        window = getattr(config, "sliding_window", None)
    return int(window) if window else None  # Qwen2-MoE says 0 for none


# --- the forward pass -----------------------------------------------------------------------


@torch.no_grad()
def dense_rows(
    model: Any,
    token_ids: Sequence[int] | Tensor,
    slots: Sequence[int] | Tensor,
    positions: Sequence[int] | Tensor,
    mask: Tensor,
    keys_before_rope: Tensor | None = None,
    values: Tensor | None = None,
    *,
    inputs: Tensor | None = None,
    added: Tensor | None = None,
) -> DenseTrace:
    """Send rows through all layers; in each, write their K and V to their slots, then attend.

    Args:
        model: A Hugging Face `*ForCausalLM`.
        token_ids: The rows' tokens, `[R]`.
        slots: Slots of the rows' keys and values, `[R]`.
        positions: RoPE position of every slot, `[N]` or `[3, N]`; a row's own position is that of
            its slot.
        mask: Boolean `[R, N]`, true where a row may look. A layer's sliding window, measured in
            positions, is applied on top.
        keys_before_rope: Keys that the slots hold beforehand, `[L, H_kv, N, D]`; None for none.
        values: Values that the slots hold beforehand, likewise.
        inputs: Inputs of the first layer, `[R, hidden]`; the tokens' embeddings if None.
        added: What is added behind the first layers (DeepStack), `[levels, R, hidden]`.
    """
    base = decoder(model)
    config = base.config
    layers = base.layers[: config.num_hidden_layers]
    ids, slots, positions = (torch.as_tensor(x).long() for x in (token_ids, slots, positions))
    row_positions = positions[..., slots]
    growth = _growth(config, row_positions)
    hidden = base.embed_tokens.weight[ids] if inputs is None else inputs
    if config.model_type == "gemma":
        hidden = hidden * base.embed_tokens.embed_scale.to(hidden.dtype)
    if inputs is None:
        hidden = hidden * getattr(config, "embedding_multiplier", 1)  # Granite
    branch, divisor = (getattr(config, f, 1) for f in ("residual_multiplier", "logits_scaling"))
    memory_k, memory_v, rotated, attention_weights = [], [], [], []
    for index, layer in enumerate(layers):
        attention = layer.self_attn
        entering = norm(_norm_of(layer, "attention_layernorm", "input_layernorm"), hidden)
        q, k_new, v_new = _queries_keys_values(attention, entering)
        shape = (k_new.shape[0], positions.shape[-1], k_new.shape[2])
        k = k_new.new_zeros(shape) if keys_before_rope is None else keys_before_rope[index].clone()
        v = v_new.new_zeros(shape) if values is None else values[index].clone()
        k[:, slots], v[:, slots] = k_new, v_new

        visible = mask
        if (window := _window(attention)) is not None:
            visible = mask & (positions[None, :] > row_positions[:, None] - window)
        group = q.shape[0] // k.shape[0]  # query heads that share one kv head
        q, k_rotated = _rotate(model, q, row_positions), _rotate(model, k, positions)
        if growth is not None:
            q = q * growth[:, None].to(q.dtype)
        scores = q @ k_rotated.repeat_interleave(group, 0).transpose(1, 2) * attention.scaling
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).to(v.dtype)  # [H, R, N]
        mixed = weights @ v.repeat_interleave(group, 0)  # [H, R, D]
        mixed = mixed.transpose(0, 1).flatten(1)
        if hasattr(attention, "attn_sub_norm"):  # BitNet
            mixed = rms_norm(attention.attn_sub_norm, mixed)
        hidden = hidden + linear(attention.o_proj, mixed) * branch
        second = _norm_of(layer, "feedforward_layernorm", "post_attention_layernorm")
        hidden = hidden + feed_forward(config, layer.mlp, norm(second, hidden)) * branch
        if added is not None and index < len(added):
            hidden = hidden + added[index]

        memory_k.append(k)
        memory_v.append(v)
        rotated.append(k_rotated)
        attention_weights.append(weights)
    return DenseTrace(
        keys_before_rope=torch.stack(memory_k),
        keys=torch.stack(rotated),
        values=torch.stack(memory_v),
        logits=linear(model.lm_head, norm(base.norm, hidden)) / divisor,
        attention=tuple(attention_weights),
    )
