"""Tiny random language models, built in memory, for tests.

The weights are drawn so that nothing is degenerate: attention is neither uniform nor one-hot, norm
weights differ from one, every bias is non-zero and logits are a few units wide. A mistake in a
mask, a rotation or a bias therefore shows up as a large error instead of vanishing.

Nothing here imports the rest of the library, so the models can be used to judge it.
"""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ifkv.testing.tiny_configs import (
    FAMILIES,
    FIXED_WIDTH,
    ORIGINAL_LENGTH,
    PARTIAL,
    SLIDING_FAMILIES,
    adapt_rotation,
    family_options,
    rope_parameters,
    untied,
)
from ifkv.testing.wide import widen_norms

ROPE_TYPES: tuple[str, ...] = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
"""RoPE types `tiny_model` can build; the last two have frequencies that depend on the length."""

# Factors on the natural scale (std 1/sqrt(fan_in), norm weights near 1). Queries and keys get more
# so that attention has contrast, the head so that logits are a few units wide.
_GAINS = {name: 1.4 for name in ("q_proj", "k_proj", "qkv_proj", "q_norm", "k_norm")}
_GAINS["lm_head"] = 3.0

_LONGROPE = ("llama", "qwen2", "qwen3", "mistral")  # beside phi3
# Their heads are as wide as hidden_size / heads by default, as here.
_DIVIDED = ("llama", "qwen2", "mistral", "phi3")


def rope_types(family: str) -> tuple[str, ...]:
    """Return the RoPE types that upstream accepts for `family`."""
    if family == "phi3":
        return ("default", "longrope")
    return ROPE_TYPES if family in _LONGROPE else ROPE_TYPES[:-1]


def tiny_model(
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    num_layers: int = 3,
    hidden_size: int = 32,
    intermediate_size: int = 48,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    vocab_size: int = 97,
    rope: str | Mapping[str, Any] = "default",
    sliding_window: int | None = None,
    max_position_embeddings: int = 512,
    wide_norms: bool | None = None,
    **config_options: Any,
) -> PreTrainedModel:
    """Build a small random causal language model in evaluation mode.

    The same `seed` gives the same weights (rounded to `dtype`) on every call and every transformers
    version; torch's global random state is left as it was.

    Args:
        family: One of `FAMILIES`.
        dtype: Weight dtype. `rotary_emb.inv_freq` is float32 whatever the dtype, as it is in a
            model loaded with `from_pretrained(dtype=...)`.
        seed: Seed of the weights.
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream; a multiple of `num_heads`.
        intermediate_size: Width of the MLP.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`.
        head_dim: Width of a head; None means `hidden_size // num_heads`.
        vocab_size: Number of tokens. Give `len(tiny_tokenizer())` to use that tokenizer.
        rope: A RoPE type (see `rope_types`) with made-up parameters, or a `rope_parameters` dict.
        sliding_window: Window in tokens, the token itself included. `LAYERED_WINDOWS` slide in
            every layer but the first, the other `SLIDING_FAMILIES` in all layers.
        max_position_embeddings: Longest sequence.
        wide_norms: True to compute norms in the model's dtype, see `wide`. None means True
            for float64 and False otherwise.
        **config_options: Further fields of the family's config.

    Returns:
        A `*ForCausalLM` of the family, on the CPU, without bos, eos and pad tokens.

    Raises:
        ValueError: Unknown family, or a RoPE type or sliding window that the family does not have.
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; tiny_model builds one of {', '.join(FAMILIES)}")
    if sliding_window is not None and family not in SLIDING_FAMILIES:
        raise ValueError(f"{family} has no sliding window; use one of {SLIDING_FAMILIES}")
    options: dict[str, Any] = dict(
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=untied(family),
    )
    width = hidden_size // num_heads if head_dim is None else head_dim
    if width * num_heads != hidden_size and family in FIXED_WIDTH:
        raise ValueError(f"{family} has heads as wide as hidden_size / num_heads, not {width}")
    if head_dim is not None or family not in _DIVIDED:
        options["head_dim"] = width
    options |= family_options(family, num_layers, sliding_window)
    if isinstance(rope, str):
        if rope not in rope_types(family):
            raise ValueError(f"rope is {rope!r}; {family} accepts one of {rope_types(family)}")
        rotary_dim = int(width * PARTIAL.get(family, 1.0))
        options["rope_parameters"] = rope_parameters(rope, rotary_dim)
    else:
        options["rope_parameters"] = dict(rope)
    adapt_rotation(family, options["rope_parameters"])
    if family == "phi3":
        options["original_max_position_embeddings"] = ORIGINAL_LENGTH
    if rope == "dynamic":  # upstream takes the length of first crossing from here
        options["max_position_embeddings"] = ORIGINAL_LENGTH
    config = AutoConfig.for_model(family, **(options | config_options))
    with torch.random.fork_rng(devices=[]):  # construction draws weights that are replaced below
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if any(weight.ndim == 3 for weight in model.parameters()):
            model.set_experts_implementation("eager")  # grouped products have no float64
    fill(model, seed)
    if wide_norms if wide_norms is not None else dtype == torch.float64:
        widen_norms(model)
    done: PreTrainedModel = model.eval().requires_grad_(False)
    return done


@functools.cache
def shared_tiny_model(family: str = "llama", **options: Any) -> PreTrainedModel:
    """Return a `tiny_model` that is built once per set of options; do not change it.

    Options must be hashable: name the RoPE type instead of giving a dict.
    """
    return tiny_model(family, **options)


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Draw every weight from its own generator, seeded by `seed` and the weight's name."""
    for name, weight in model.named_parameters():
        draw = _draw(name, weight, seed)
        path = name.split(".")
        module = path[-2]
        if name.endswith("bias"):
            draw *= 0.3
        elif weight.ndim == 1:  # a norm's weight
            kind = type(model.get_submodule(".".join(path[:-1]))).__name__
            offset = 0.0 if kind.startswith("Gemma") else 1.0  # which adds 1 itself
            draw = _GAINS.get(module, 1.0) * (offset + 0.25 * draw)
        elif module != "embed_tokens":
            draw *= _GAINS.get(module, 1.0) * weight.shape[1 if weight.ndim == 2 else -1] ** -0.5
        weight.copy_(draw)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * _draw(name, buffer, seed).abs())


def _draw(name: str, like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)


def truth_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a float64 copy of a half- or single-precision model: the truth it approximates.

    Weights are converted exactly, norms are widened, and `inv_freq` stays float32. So the copy
    differs from `model` only in the rounding of its arithmetic.
    """
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.data = weight.data.double()
    twin.config.dtype = torch.float64
    widen_norms(twin)
    return twin
