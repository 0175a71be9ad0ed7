"""Recompute of rows in the first layers only: sets of slots that shrink as depth grows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ifkv.errors import InvalidInputError
from ifkv.forward.layers import run_attention, run_layers
from ifkv.models.decoder import DecoderView
from ifkv.steps.rows_pass import RowsPass
from ifkv.utils.checks import whole_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache
    from ifkv.forward.picture_rows import PictureRows
    from ifkv.patching.handle import PatchHandle


def checked_depths(
    depths: Sequence[int] | Tensor, slots: Sequence[int] | Tensor, layers: int
) -> Tensor:
    """Check the depths of checked slots, and return them in the ascending order of the slots.

    Returns:
        Long ``[k]``, on the CPU.

    Raises:
        InvalidInputError: They are not one whole number from 0 to ``layers`` for each slot.
    """
    given = whole_numbers(depths, "depths")
    order = torch.as_tensor(slots).detach().cpu().argsort()
    if len(given) != len(order):
        raise InvalidInputError(
            f"there are {len(given)} depths for {len(order)} slots; give one for each slot."
        )
    bad = [depth for depth in given if not 0 <= depth <= layers]
    if bad:
        raise InvalidInputError(
            f"depth {bad[0]} is out of range: a slot is recomputed in 0 to {layers} layers."
        )
    return torch.tensor(given, dtype=torch.long)[order]


def run_by_depth(
    model: PreTrainedModel,
    handle: PatchHandle,
    caches: Sequence[StitchedCache],
    hidden: Tensor,
    slots: Sequence[Tensor],
    lengths: Sequence[int],
    depths: Sequence[Tensor],
    begins: Sequence[Tensor],
    pictures: PictureRows | None = None,
) -> Tensor:
    """Run each row through its layers, up to the last layer's keys and values.

    Args:
        model: A patched model.
        handle: Its handle.
        caches: The cache of each request.
        hidden: Input of each row's first layer, request after request, ``[1, rows, hidden]``.
        slots: Each request's, long, ascending, on the CPU.
        lengths: Each request's slots in use once the rows have run.
        depths: Each request's, long, on the CPU, one per row.
        begins: Each row's first layer, as the depths; below the depth.
        pictures: The rows of pictures, which begin in the first layer.

    Returns:
        ``[1, rows, hidden]``: the last layer's input, at the rows that reach it.
    """
    layers = DecoderView(model).num_layers
    cuts = sorted({0, *torch.cat([*depths, *begins]).tolist()})
    hidden = hidden.clone()
    for start, stop in pairwise(cuts):
        # Between two layers where rows begin or end, the same rows run.
        alive = [
            (own >= stop) & (first <= start) for own, first in zip(depths, begins, strict=True)
        ]
        if not any(bool(part.any()) for part in alive):
            continue
        own = [part[kept] for part, kept in zip(slots, alive, strict=True)]
        plan = handle.backend.plan_requests(own, lengths, model.device)
        counts = [len(part) for part in own]
        run = RowsPass(handle, caches, counts, plan, skip_attention_in=layers - 1)
        positions = run.positions
        rotation = handle.rope.rotation(positions, hidden.dtype)
        at = torch.cat(alive).nonzero()[:, 0].to(hidden.device)
        end = min(stop, layers - 1)
        alive_pictures = None if pictures is None else pictures.among(at)
        rows = run_layers(
            model,
            hidden[:, at],
            positions,
            rotation,
            run,
            end,
            start=start,
            pictures=alive_pictures,
        )
        if stop == layers:
            run_attention(model, rows, positions, rotation, run, layers - 1)
        hidden[:, at] = rows
    return hidden
