"""Rotary embedding of a model: its own cosines and sines, and the rotation in its arithmetic.

Keys are stored before the rotation and rotated once, when a request places them. Cosines and sines
come from the model's rotary module, and the rotation repeats transformers' operations in their
order. So rotated keys are bit-equal to those that the model itself would cache, in every dtype and
with attention scaling (YaRN, longrope).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.errors import InvalidInputError, UnsupportedRopeError
from ifkv.models.decoder import DecoderView
from ifkv.models.wrappers import wrapper_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.models.families import Family
    from ifkv.models.wrappers import Wrapper

_REASONS = {
    "dynamic": "its frequencies depend on the longest sequence seen so far, so keys made at one "
    "length cannot be moved to another",
}


def position_limit(config: Any) -> tuple[int, str]:
    """Return the number of positions that a config allows, and the reason as text."""
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
    """Rotary embedding of one model.

    Attributes:
        rope_type: ``"default"``, ``"linear"``, ``"llama3"``, ``"yarn"`` or ``"longrope"``.
        rotary_dim: Number of leading dimensions of a head that are rotated.
        limit: Number of positions; they run from 0 to ``limit - 1``.
        limit_reason: The reason for the limit, as text.
        axes: Number of axes of a position.

    Args:
        model: The model.
        family: Its family.

    Raises:
        UnsupportedRopeError: The family does not allow the rope type, the frequencies were cast to
            half precision, or this release of transformers leaves several axes unmerged.
    """

    def __init__(self, model: PreTrainedModel, family: Family):
        view = DecoderView(model)
        config: Any = view.config
        parameters: dict[str, Any] = config.rope_parameters
        self.rope_type: str = parameters.get("rope_type", "default")
        if self.rope_type not in family.rope_types:
            reason = _REASONS.get(self.rope_type, "it is not among the verified ones")
            raise UnsupportedRopeError(
                f"rope type {self.rope_type!r} is not supported for family {family.name!r}: "
                f"{reason}. Supported are {', '.join(family.rope_types)}."
            )
        self._module = view.rotary
        self._tower: Any = None
        self.axes = 1
        if (wrapper := wrapper_of(model)) is not None:
            self.axes, self._tower = wrapper.rope_axes, wrapper.tower_of(model)
            _check_merged(self._module, wrapper)
        self.rotary_dim = 2 * self._module.inv_freq.numel()
        self.check_frequencies()
        self.limit, self.limit_reason = position_limit(config)

    def check_frequencies(self) -> None:
        """Raise if ``model.to(bfloat16)`` or ``model.half()`` has rounded the frequencies.

        Raises:
            UnsupportedRopeError: ``inv_freq`` is, or was, in half precision.
        """
        frequencies = {"rotary_emb.inv_freq": self._module.inv_freq}
        if self._tower is not None:
            found = self._tower.named_buffers()
            frequencies |= {path: held for path, held in found if path.endswith("inv_freq")}
        for name, inv_freq in frequencies.items():
            if _is_rounded(inv_freq):
                raise UnsupportedRopeError(
                    f"{name} ({inv_freq.dtype}) has been cast to half precision, which turns "
                    "positions in the thousands into noise. Load the model with "
                    "from_pretrained(..., dtype=...) instead of calling .to(dtype) or .half() on "
                    "it."
                )

    def check_length(
        self,
        length: int,
        what: str,
        advice: str = "Use fewer or shorter documents, or ask for fewer tokens.",
    ) -> None:
        """Raise if a sequence is longer than the model's positions.

        Args:
            length: Positions that the sequence takes.
            what: Its name, for the message.
            advice: The way out, for the message.

        Raises:
            InvalidInputError: ``length`` is greater than `limit`.
        """
        if length > self.limit:
            raise InvalidInputError(
                f"{length} positions are needed for {what}, but {self.limit_reason}. {advice}"
            )

    def check_answer(self, length: int, new_tokens: int, what: str) -> None:
        """Raise if an answer would make longrope change its frequencies.

        Args:
            length: Positions that context and prompt take.
            new_tokens: Length of the answer at most.
            what: Name of context, prompt and answer together, for the message.

        Raises:
            InvalidInputError: The rope type is longrope, and the answer would reach further than
                `limit`.
        """
        if new_tokens and self.rope_type == "longrope":
            self.check_length(length + new_tokens - 1, what)  # the last new token is not run

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute cosines and sines by the model's rotary module, with its attention scaling.

        Args:
            positions: Long ``[n]``, or ``[axes, n]`` for a module that rotates by several axes, of
                which ``[n]`` stands for equal ones; on the model's device.
            dtype: The model's dtype.

        Returns:
            Two tensors ``[n, rotary_dim]`` of ``dtype``.
        """
        like = torch.empty(0, dtype=dtype, device=positions.device)
        if positions.shape[-1] == 0:  # longrope would fail: it reads the largest position
            nothing = like.reshape(0, 1).expand(0, self.rotary_dim)
            return nothing, nothing
        if self.axes > 1:
            positions = positions.expand(self.axes, -1)
        cos, sin = self._module(like, position_ids=positions[..., None, :])
        return cos[0], sin[0]

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute the position embeddings that layers take.

        Args:
            positions: As in `cos_sin`.
            dtype: The model's dtype.

        Returns:
            Cosines and sines, ``[1, n, rotary_dim]``.
        """
        cos, sin = self.cos_sin(positions, dtype)
        return cos[None], sin[None]

    def identity(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return a rotation that changes nothing, for runs that rotate later.

        Returns:
            Ones and zeros, each ``[1, 1, rotary_dim]``; they broadcast over rows.
        """
        one = torch.ones(1, 1, self.rotary_dim, dtype=dtype, device=device)
        return one, torch.zeros_like(one)


def join_positions(parts: Sequence[Tensor]) -> Tensor:
    """Join positions of several rows, of which some may have one axis for several equal ones.

    Args:
        parts: Long ``[n]`` or ``[axes, n]``.

    Returns:
        ``[rows]``, or ``[axes, rows]`` if a part has several axes.
    """
    shape = max((part.shape[:-1] for part in parts), key=len)
    return torch.cat([part.expand(*shape, -1) for part in parts], dim=-1)


def _is_rounded(inv_freq: Tensor) -> bool:
    """True if frequencies are, or were, in half precision."""
    if inv_freq.dtype not in (torch.float32, torch.float64):
        return True
    # After a cast down and up, half precision represents every frequency exactly.
    return inv_freq.numel() > 1 and any(
        bool((inv_freq == inv_freq.to(short).to(inv_freq.dtype)).all())
        for short in (torch.bfloat16, torch.float16)
    )


def _check_merged(module: Any, wrapper: Wrapper) -> None:
    """Raise if a rotary module gives cosines of each axis, which its attention merges itself."""
    inv_freq = module.inv_freq
    places = torch.zeros(wrapper.rope_axes, 1, 1, dtype=torch.long, device=inv_freq.device)
    cos, _ = module(inv_freq.new_empty(0, dtype=torch.float32), position_ids=places)
    if cos.ndim != 3:
        raise UnsupportedRopeError(
            f"{type(module).__name__} of this release of transformers leaves the axes of positions "
            f"to the attention to merge. Install transformers {wrapper.since} or later."
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotate the leading dimensions of heads: ``x * cos + rotate_half(x) * sin`` (2104.09864).

    The result is bit-equal to transformers' ``apply_rotary_pos_emb`` in the half-split layout: the
    same products, rounded at the same places, with fewer temporaries.

    Args:
        x: ``[..., n, head_dim]``.
        cos: ``[n, rotary_dim]``, both halves equal, in x's dtype.
        sin: ``[n, rotary_dim]``.
        out: Tensor to write to, of x's shape and without overlap with x; allocated if None.

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
    """Rotate a document's keys into a cache and copy its values, beginning at a slot.

    In half precision on CUDA, one Triton kernel does both if Triton is installed (it comes with
    torch). The result is bit-equal to that of `rotate`.

    Args:
        keys: Keys before the rotation, ``[layers, kv_heads, n, head_dim]``.
        values: Values of the same shape.
        cos: ``[n, rotary_dim]``, as in `rotate`.
        sin: ``[n, rotary_dim]``.
        keys_out: ``[layers, kv_heads, slots, head_dim]``, its last dimension contiguous.
        values_out: Tensor of the same shape and strides.
        slot: Slot of the first row.
    """
    if keys.device.type == "cuda" and keys.dtype in (torch.float16, torch.bfloat16):
        with contextlib.suppress(ImportError):
            from ifkv.models.rope_triton import place_rotated

            place_rotated(keys, values, cos, sin, keys_out, values_out, slot)
            return
    own = slice(slot, slot + keys.shape[2])
    rotate(keys, cos, sin, out=keys_out[:, :, own])
    values_out[:, :, own] = values
