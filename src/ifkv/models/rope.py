"""Rotary geometry of a model: cos and sin from its own module, one rotation in its own arithmetic.

Keys are stored before the rotation and rotated once, when a request places them. Because cos and
sin come from the model's own rotary module and the rotation repeats transformers' operations in
their order, rotated keys are bit-equal to those the model would have cached natively, attention
scaling (YaRN, longrope) included, in every dtype.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.errors import InvalidInputError, UnsupportedRopeError
from ifkv.models.decoder import DecoderView

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.models.families import Family

_REASONS = {
    "dynamic": "its frequencies depend on the longest sequence seen so far, so keys made at one "
    "length cannot be moved to another",
}


def position_limit(config: Any) -> tuple[int, str]:
    """How many positions a model has, by its config alone, and why, in words."""
    limit: int = config.max_position_embeddings
    parameters: dict[str, Any] = config.rope_parameters
    if parameters.get("rope_type") != "longrope":
        return limit, f"max_position_embeddings is {limit}"
    limit = parameters.get("original_max_position_embeddings", limit)
    return limit, (
        f"longrope changes its frequencies beyond {limit} positions, and keys made with the short "
        "ones cannot be moved there"
    )


class Rope:
    """Rotary geometry of one model.

    Attributes:
        rope_type: ``"default"``, ``"linear"``, ``"llama3"``, ``"yarn"`` or ``"longrope"``.
        rotary_dim: How many leading dimensions of a head are rotated; the others pass through.
        limit: Positions run from 0 to ``limit - 1``.
        limit_reason: Why, in words.

    Args:
        model: The model.
        family: Its family.

    Raises:
        UnsupportedRopeError: The rope type is not one the family allows, or the frequencies have
            been cast to half precision.
    """

    def __init__(self, model: PreTrainedModel, family: Family):
        config = model.config
        parameters: dict[str, Any] = config.rope_parameters
        self.rope_type: str = parameters.get("rope_type", "default")
        if self.rope_type not in family.rope_types:
            reason = _REASONS.get(self.rope_type, "it is not among the verified ones")
            raise UnsupportedRopeError(
                f"rope type {self.rope_type!r} is not supported for family {family.name!r}: "
                f"{reason}. Supported are {', '.join(family.rope_types)}."
            )
        self._module = DecoderView(model).rotary
        self.rotary_dim = 2 * self._module.inv_freq.numel()
        self.check_frequencies()
        self.limit, self.limit_reason = position_limit(config)

    def check_frequencies(self) -> None:
        """Refuse frequencies that ``model.to(bfloat16)`` or ``model.half()`` has rounded.

        Raises:
            UnsupportedRopeError: ``inv_freq`` is, or has been, half precision.
        """
        inv_freq: Tensor = self._module.inv_freq
        rounded = inv_freq.dtype not in (torch.float32, torch.float64)
        if not rounded and inv_freq.numel() > 1:
            # Cast down and up again: every frequency would be representable in the short dtype.
            rounded = any(
                bool((inv_freq == inv_freq.to(short).to(inv_freq.dtype)).all())
                for short in (torch.bfloat16, torch.float16)
            )
        if rounded:
            raise UnsupportedRopeError(
                f"rotary_emb.inv_freq ({inv_freq.dtype}) has been cast to half precision, which "
                "turns positions in the thousands into noise. Load the model with "
                "from_pretrained(..., dtype=...) instead of calling .to(dtype) or .half() on it."
            )

    def check_length(
        self,
        length: int,
        what: str,
        advice: str = "Use fewer or shorter documents, or ask for fewer tokens.",
    ) -> None:
        """Refuse a sequence that reaches beyond the model's positions.

        Args:
            length: Positions it takes.
            what: What it is, for the message.
            advice: What to do about it, for the message.

        Raises:
            InvalidInputError: ``length`` is greater than `limit`.
        """
        if length > self.limit:
            raise InvalidInputError(
                f"{length} positions are needed for {what}, but {self.limit_reason}. {advice}"
            )

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines, attention scaling included, as the model itself makes them.

        Args:
            positions: Long, ``[n]``, or ``[axes, n]`` for a module that rotates by several axes,
                on the model's device.
            dtype: The model's dtype.

        Returns:
            Two tensors ``[n, rotary_dim]`` of ``dtype``.
        """
        like = torch.empty(0, dtype=dtype, device=positions.device)
        if positions.shape[-1] == 0:  # longrope asks for the largest position, which there must be
            nothing = like.reshape(0, 1).expand(0, self.rotary_dim)
            return nothing, nothing
        cos, sin = self._module(like, position_ids=positions[..., None, :])
        return cos[0], sin[0]

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what layers take as their position embeddings.

        Args:
            positions: As in `cos_sin`.
            dtype: The model's dtype.

        Returns:
            Cosines and sines, ``[1, n, rotary_dim]``.
        """
        cos, sin = self.cos_sin(positions, dtype)
        return cos[None], sin[None]

    def identity(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """A rotation that leaves queries and keys as they are, for runs that rotate later.

        Returns:
            Ones and zeros, ``[1, 1, rotary_dim]``: they broadcast over a batch and its rows.
        """
        one = torch.ones(1, 1, self.rotary_dim, dtype=dtype, device=device)
        return one, torch.zeros_like(one)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotate the leading dimensions of heads: ``x * cos + rotate_half(x) * sin`` (2104.09864).

    Bit-equal to transformers' ``apply_rotary_pos_emb`` in the half-split layout: the same products,
    rounded at the same places, without its temporaries.

    Args:
        x: ``[..., n, head_dim]``.
        cos: ``[n, rotary_dim]``, both halves equal; of x's dtype.
        sin: ``[n, rotary_dim]``.
        out: Where to write, of x's shape and not overlapping it; made if None.

    Returns:
        ``out``.
    """
    if out is None:
        out = torch.empty_like(x)
    rotary_dim = cos.shape[-1]
    half = rotary_dim // 2
    first, second = x[..., :half], x[..., half:rotary_dim]
    cos, sin = cos[..., :half], sin[..., :half]
    torch.mul(first, cos, out=out[..., :half]).sub_(second * sin)
    torch.mul(second, cos, out=out[..., half:rotary_dim]).add_(first * sin)
    if rotary_dim < x.shape[-1]:
        out[..., rotary_dim:] = x[..., rotary_dim:]
    return out


def place(
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys_out: Tensor,
    values_out: Tensor,
    slot: int,
) -> None:
    """Rotate a document's keys into a cache and copy its values, from a slot on.

    In one pass by a Triton kernel on CUDA, in half precision, wherever Triton is installed (torch
    brings it); to the bit what `rotate` computes.

    Args:
        keys: Before the rotation, ``[layers, kv_heads, n, head_dim]``.
        values: Of the same shape.
        cos: ``[n, rotary_dim]``, as in `rotate`.
        sin: ``[n, rotary_dim]``.
        keys_out: ``[layers, kv_heads, slots, head_dim]``, its last dimension contiguous.
        values_out: Of the same shape and strides.
        slot: Where the first row goes.
    """
    if keys.device.type == "cuda" and keys.dtype in (torch.float16, torch.bfloat16):
        with contextlib.suppress(ImportError):
            from ifkv.models.rope_triton import place_rotated

            place_rotated(keys, values, cos, sin, keys_out, values_out, slot)
            return
    own = slice(slot, slot + keys.shape[2])
    rotate(keys, cos, sin, out=keys_out[:, :, own])
    values_out[:, :, own] = values
