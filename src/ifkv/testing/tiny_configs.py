"""Config options of the tiny models: what each family's config needs beside the common sizes.

Options are chosen such that every part of a family's arithmetic is at work: experts are more than
a row uses, projections are clipped, and queries are scaled from few positions on.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

FAMILIES: tuple[str, ...] = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "apertus",
    "arcee",
    "aria_text",
    "bitnet",
    "cwm",
    "dots1",
    "gemma",
    "glm4_moe",
    "granite",
    "jais2",
    "minimax_m2",
    "ministral",
    "ministral3",
    "mixtral",
    "olmo",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "seed_oss",
    "solar_open",
    "starcoder2",
)
"""Model families `tiny_model` can build."""

ARITHMETICS: tuple[str, ...] = ("llama", "qwen2", "qwen3", "mistral", "phi3")
"""One family for each kind of arithmetic; the others compute as one of these does."""

LAYERED_WINDOWS: tuple[str, ...] = ("qwen2", "qwen3", "ministral", "cwm", "dots1")
"""Families that slide in some layers: in a tiny model, in all but the first."""

SLIDING_FAMILIES: tuple[str, ...] = (
    *LAYERED_WINDOWS,
    "mistral",
    "phi3",
    "ministral3",
    "mixtral",
    "qwen3_moe",
    "starcoder2",
)
"""Families whose upstream code knows a sliding window."""

ROUTED_FAMILIES: tuple[str, ...] = (
    "aria_text",
    "dots1",
    "glm4_moe",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "solar_open",
)
"""Families that send rows to experts: where two are nearly tied, a rounding decides."""

FIXED_WIDTH: tuple[str, ...] = ("bitnet", "olmoe")
"""Families whose heads together are as wide as the hidden states."""

ORIGINAL_LENGTH = 64
"""Length up to which a `dynamic` or `longrope` tiny model keeps its first frequencies."""

PARTIAL = {"phi3": 0.5, "minimax_m2": 0.5, "glm4_moe": 0.5}
"""Share of a head's dimensions that is rotated, where it is not all of them."""

_UNUSED_WINDOW = 4096
_EXPERTS, _USED, _WIDTH = 4, 2, 24

_ROUTED = dict(num_experts=_EXPERTS, num_experts_per_tok=_USED, norm_topk_prob=True)
_GROUPED = dict(
    n_routed_experts=_EXPERTS,
    num_experts_per_tok=_USED,
    n_shared_experts=1,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=1.5,
    norm_topk_prob=True,
    moe_intermediate_size=_WIDTH,
)
_OPTIONS: dict[str, dict[str, Any]] = {
    "apertus": dict(hidden_act="relu2"),
    "arcee": dict(hidden_act="relu2", mlp_bias=True),
    "aria_text": dict(moe_num_experts=_EXPERTS, moe_topk=_USED, moe_num_shared_experts=1),
    "bitnet": dict(hidden_act="relu2"),
    "cwm": dict(bos_token_id=0),  # which upstream's config requires
    "dots1": dict(first_k_dense_replace=1, **_GROUPED),
    "gemma": dict(hidden_act="gelu_pytorch_tanh"),
    "glm4_moe": dict(first_k_dense_replace=1, use_qk_norm=True, **_GROUPED),
    "granite": dict(
        embedding_multiplier=3.0,
        logits_scaling=1.5,
        residual_multiplier=0.7,
        attention_multiplier=0.45,
        attention_bias=True,
        mlp_bias=True,
    ),
    "jais2": dict(hidden_act="relu2", mlp_bias=True, attention_bias=True),
    "minimax_m2": dict(num_local_experts=_EXPERTS, num_experts_per_tok=_USED),
    "mixtral": dict(num_local_experts=_EXPERTS, num_experts_per_tok=_USED),
    "olmo": dict(clip_qkv=2.0),
    "olmoe": _ROUTED,
    "qwen2_moe": dict(
        moe_intermediate_size=_WIDTH, shared_expert_intermediate_size=_WIDTH, **_ROUTED
    ),
    "qwen3_moe": dict(moe_intermediate_size=_WIDTH, **_ROUTED),
    "seed_oss": dict(attention_bias=True, attention_out_bias=False, residual_dropout=0.0),
    "solar_open": _GROUPED,
    "starcoder2": dict(use_bias=True, hidden_act="gelu_pytorch_tanh"),
}


def family_options(family: str, num_layers: int, window: int | None) -> dict[str, Any]:
    """Return the config options of a family beside sizes and rotation.

    Args:
        family: One of `FAMILIES`.
        num_layers: Decoder layers.
        window: Sliding window, of a family that has one.
    """
    options = dict(_OPTIONS.get(family, {}))
    if family in SLIDING_FAMILIES:
        options["sliding_window"] = window
    if family in ("qwen2", "qwen3"):
        options |= dict(use_sliding_window=window is not None, max_window_layers=1)
    elif family in LAYERED_WINDOWS:
        kind = "full_attention" if window is None else "sliding_attention"
        options["layer_types"] = ["full_attention", *[kind] * (num_layers - 1)]
        # The masks of both types are always made, so the width of a window is always needed.
        options["sliding_window"] = _UNUSED_WINDOW if window is None else window
    elif family == "qwen3_moe":
        options["use_sliding_window"] = window is not None
    return options


def untied(family: str) -> bool | int:
    """Return what a family's config takes for embeddings that are not tied.

    OLMo's in transformers 5.4 takes numbers alone.
    """
    kind = CONFIG_MAPPING[family].__annotations__.get("tie_word_embeddings")
    return 0 if kind in (int, "int") else False


def adapt_rotation(family: str, parameters: dict[str, Any]) -> None:
    """Add a family's own parameters to those of its RoPE type, in place."""
    if family in PARTIAL:
        parameters.setdefault("partial_rotary_factor", PARTIAL[family])
    if family == "ministral3":  # queries grow with their position, in steps of the second number
        parameters.setdefault("llama_4_scaling_beta", 0.5)
        parameters.setdefault("original_max_position_embeddings", 4)


def rope_parameters(rope: str, rotary_dim: int) -> dict[str, Any]:
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
