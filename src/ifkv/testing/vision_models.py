"""Tiny random vision-language models and pictures, for tests.

As in `models`, weights are drawn so that nothing is degenerate, and nothing here imports the rest
of the library.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from ifkv.testing.models import fill
from ifkv.testing.wide import widen_norms

VISION_FAMILIES: tuple[str, ...] = ("qwen3_vl", "qwen2_5_vl", "qwen2_vl")
"""Vision-language families `tiny_vision_model` can build."""

LATE_FAMILIES: tuple[str, ...] = ("qwen2_5_vl", "qwen2_vl")
"""Those that are refused before transformers 5.17."""

VISION_START, IMAGE, VISION_END, VIDEO = 90, 91, 92, 93
"""Token ids of tiny models: the marks around a picture, and the placeholders of its rows."""

MERGE, PATCH, CHANNELS = 2, 2, 3
TEMPORAL = 2


def tiny_vision_model(
    family: str = "qwen3_vl",
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    num_layers: int = 4,
    wide_norms: bool | None = None,
    deepstack: Sequence[int] = (0, 2),
    **text_options: Any,
) -> PreTrainedModel:
    """Build a small random vision-language model in evaluation mode.

    Args:
        family: One of `VISION_FAMILIES`.
        dtype: Weight dtype; frequencies stay float32.
        seed: Seed of the weights.
        num_layers: Decoder layers.
        wide_norms: As in `tiny_model`.
        deepstack: Layers of the tower whose features are added to the decoder's first layers, for
            families that do so.
        **text_options: Further fields of the decoder's config.

    Returns:
        A ``*ForConditionalGeneration`` with a vocabulary of 97, on the CPU.

    Raises:
        ValueError: Unknown family.
    """
    if family not in VISION_FAMILIES:
        raise ValueError(f"family is {family!r}; choose one of {', '.join(VISION_FAMILIES)}")
    text: dict[str, Any] = dict(
        num_hidden_layers=num_layers,
        hidden_size=64,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [3, 3, 2],
        },
    )
    vision: dict[str, Any] = dict(
        depth=3,
        hidden_size=32,
        intermediate_size=40,
        num_heads=2,
        in_channels=CHANNELS,
        patch_size=PATCH,
        temporal_patch_size=TEMPORAL,
        spatial_merge_size=MERGE,
        out_hidden_size=64,
    )
    if family.startswith("qwen3_vl"):
        text["head_dim"] = 16
        text["rope_parameters"]["mrope_interleaved"] = True
        vision |= dict(num_position_embeddings=16, deepstack_visual_indexes=list(deepstack))
    elif family == "qwen2_5_vl":  # windows of 2 x 2 merged patches in all of its layers but one
        vision |= dict(window_size=8, fullatt_block_indexes=[1])
    else:  # its tower names its width otherwise
        vision |= dict(embed_dim=32, hidden_size=64, mlp_ratio=2)
        del vision["intermediate_size"], vision["out_hidden_size"]
    config = AutoConfig.for_model(
        family,
        text_config=text | text_options,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    fill(model, seed)
    if wide_norms if wide_norms is not None else dtype == torch.float64:
        widen_norms(model)
    done: PreTrainedModel = model.eval().requires_grad_(False)
    return done


@functools.cache
def shared_tiny_vision_model(family: str = "qwen3_vl", **options: Any) -> PreTrainedModel:
    """Return a `tiny_vision_model` that is built once per set of options; do not change it."""
    return tiny_vision_model(family, **options)


def vision_families() -> tuple[str, ...]:
    """Return those of `VISION_FAMILIES` that work with the installed release of transformers."""
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    late = LATE_FAMILIES if release < (5, 17) else ()
    return tuple(family for family in VISION_FAMILIES if family not in late)


def random_pictures(sizes: Sequence[tuple[int, int]], seed: int = 0) -> dict[str, Tensor]:
    """Return pictures of noise as an image processor returns them.

    Args:
        sizes: Rows and columns of merged patches of each picture.
        seed: Seed of the pixels.
    """
    draw = torch.Generator().manual_seed(seed)
    grids = torch.tensor([[1, MERGE * rows, MERGE * columns] for rows, columns in sizes])
    patches = int(grids.prod(dim=-1).sum())
    width = CHANNELS * TEMPORAL * PATCH * PATCH
    return {
        "pixel_values": torch.randn(patches, width, generator=draw),
        "image_grid_thw": grids,
    }


def picture_ids(rows: int, columns: int) -> list[int]:
    """Return the tokens of one picture: its marks and its placeholders."""
    return [VISION_START, *[IMAGE] * (rows * columns), VISION_END]
