"""Positions of the rows of pictures: upstream's own, and the check that they can be moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ifkv.errors import UnsupportedRopeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.models.wrappers import Wrapper


def positions_of(
    model: PreTrainedModel, wrapper: Wrapper, token_ids: Tensor, grids: Tensor
) -> tuple[Tensor, int]:
    """Return the positions of a document's tokens, counted from its start, and its extent.

    They are what the model's ``get_rope_index`` gives. A picture takes as many positions as its
    longer side has rows or columns, far fewer than its tokens.

    Args:
        model: The model.
        wrapper: Its wrapper.
        token_ids: Long ``[n]``, placeholders included, on the CPU.
        grids: Time, height and width of each picture in patches, long ``[pictures, 3]``, on the
            CPU.

    Returns:
        Long ``[axes, n]``, on the CPU, and the positions that the document takes.
    """
    # One token of text behind: its position is the extent.
    ids = torch.cat((token_ids, token_ids.new_zeros(1)))[None]
    pictures = ids == wrapper.image_token_id(model)
    pictures[0, -1] = False
    found, _ = wrapper.inner_of(model).get_rope_index(
        ids, mm_token_type_ids=pictures.int(), image_grid_thw=grids
    )
    positions: Tensor = found[:, 0].cpu()
    return positions[:, :-1], int(positions[0, -1])


def check_pictures_move(model: PreTrainedModel, wrapper: Wrapper) -> None:
    """Raise if a picture that stands elsewhere does not have the same positions, moved.

    Some releases of transformers multiply the starting point of a still picture. Its keys cannot be
    moved to another place then.

    Raises:
        UnsupportedRopeError: The positions do not move by one number on all axes.
    """
    side = model.config.vision_config.spatial_merge_size
    grids = torch.tensor([[1, 2 * side, 3 * side]])
    picture = torch.full((6,), wrapper.image_token_id(model), dtype=torch.long)
    text = torch.zeros(3, dtype=torch.long)
    alone, _ = positions_of(model, wrapper, picture, grids)
    behind, _ = positions_of(model, wrapper, torch.cat((text, picture)), grids)
    if not torch.equal(behind[:, 3:], alone + 3):
        raise UnsupportedRopeError(
            f"{type(model).__name__} of this release of transformers gives a picture that stands 3 "
            f"positions later the positions {behind[:, 3].tolist()} where "
            f"{(alone[:, 0] + 3).tolist()} are wanted, so its keys cannot be moved exactly. "
            f"Install transformers {wrapper.since} or later."
        )
