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

FAMILIES: tuple[str, ...] = ("llama", "qwen2", "qwen3", "mistral", "phi3")
"""Model families `tiny_model` can build."""

SLIDING_FAMILIES: tuple[str, ...] = ("qwen2", "qwen3", "mistral", "phi3")
"""Families whose upstream code knows a sliding window."""

ROPE_TYPES: tuple[str, ...] = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
"""RoPE types `tiny_model` can build; the last two have frequencies that depend on the length."""

ORIGINAL_LENGTH = 64
"""Length up to which a `dynamic` or `longrope` tiny model keeps its first frequencies."""

# Factors on the natural scale (std 1/sqrt(fan_in), norm weights near 1). Queries and keys get more
# so that attention has contrast, the head so that logits are a few units wide.
_GAINS = {name: 1.4 for name in ("q_proj", "k_proj", "qkv_proj", "q_norm", "k_norm")}
_GAINS["lm_head"] = 3.0


def rope_types(family: str) -> tuple[str, ...]:
    """Return the RoPE types that upstream accepts for `family`."""
    return ("default", "longrope") if family == "phi3" else ROPE_TYPES


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
        sliding_window: Window in tokens, the token itself included. Qwen families slide in every
            layer but the first, Mistral and Phi-3 in all layers.
        max_position_embeddings: Longest sequence.
        wide_norms: True to compute norms in the model's dtype, see `widen_norms`. None means True
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
        tie_word_embeddings=False,
    )
    width = hidden_size // num_heads if head_dim is None else head_dim
    if head_dim is not None or family == "qwen3":  # Qwen3's default is 128 whatever the hidden size
        options["head_dim"] = width
    if family in SLIDING_FAMILIES:
        options["sliding_window"] = sliding_window
    if family in ("qwen2", "qwen3"):
        options |= dict(use_sliding_window=sliding_window is not None, max_window_layers=1)
    partial = 0.5 if family == "phi3" else 1.0
    rotary_dim = int(width * partial)
    if isinstance(rope, str):
        if rope not in rope_types(family):
            raise ValueError(f"rope is {rope!r}; {family} accepts one of {rope_types(family)}")
        options["rope_parameters"] = _rope_parameters(rope, rotary_dim)
    else:
        options["rope_parameters"] = dict(rope)
    if family == "phi3":
        options["rope_parameters"].setdefault("partial_rotary_factor", partial)
        options["original_max_position_embeddings"] = ORIGINAL_LENGTH
    if rope == "dynamic":  # upstream takes the length of first crossing from here
        options["max_position_embeddings"] = ORIGINAL_LENGTH
    config = AutoConfig.for_model(family, **(options | config_options))
    with torch.random.fork_rng(devices=[]):  # construction draws weights that are replaced below
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
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


def _rope_parameters(rope: str, rotary_dim: int) -> dict[str, Any]:
    """Return made-up parameters with which every branch of the RoPE type is in use."""
    base: dict[str, Any] = {"rope_type": rope, "rope_theta": 10000.0}
    pairs = range(rotary_dim // 2)
    extra: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 2.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL_LENGTH,
        },
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 2 * ORIGINAL_LENGTH},
        "longrope": {
            "short_factor": [1.0 + 0.05 * pair for pair in pairs],
            "long_factor": [2.0 + 0.5 * pair for pair in pairs],
            "factor": 8.0,
            "original_max_position_embeddings": ORIGINAL_LENGTH,
        },
    }
    return base | extra[rope]


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Draw every weight from its own generator, seeded by `seed` and the weight's name."""
    for name, weight in model.named_parameters():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        module = name.split(".")[-2]
        if name.endswith("bias"):
            draw *= 0.3
        elif weight.ndim == 1:  # a norm's weight
            draw = _GAINS.get(module, 1.0) * (1.0 + 0.25 * draw)
        elif module != "embed_tokens":
            draw *= _GAINS.get(module, 1.0) * weight.shape[1] ** -0.5
        weight.copy_(draw)


class WideRMSNorm(nn.Module):
    """RMS norm in the dtype of its input; upstream rounds to float32 on the way.

    `compute_dtype` tells the oracle which of the two a module does.
    """

    compute_dtype = torch.float64

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last axis. Shape: `[..., n]` to `[..., n]`."""
        variance = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


def widen_norms(model: nn.Module) -> None:
    """Replace the RMS norms of a float64 model by `WideRMSNorm`, in place, sharing their weights.

    Upstream norms round their input to float32 even in a float64 model. Rounding is a step
    function: mostly it hides differences of 1e-16, and now and then it turns one into 1e-8. Without
    the steps, float64 comparisons at 1e-12 are both safe and sharp.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            norm: Any = child
            if type(norm).__name__.endswith("RMSNorm") and not isinstance(norm, WideRMSNorm):
                setattr(parent, name, WideRMSNorm(norm.weight, norm.variance_epsilon))


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
