"""The sequence that a direct call of ``model.generate()`` is given beside a stitched cache.

``generate()`` takes the tokens of context and prompt, or those of the prompt with an attention mask
over both. It tells the two apart by their lengths alone, and cuts the context off without comparing
it. It hands these tokens to no cache. So they are read from the frame of its prefill, which asks
the cache for its length; that frame has one name in 5.4 to 5.24.
"""

from __future__ import annotations

from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from ifkv.errors import InvalidInputError

_PREFILL = "_prefill"
# Where a vision-language model makes positions if it is given none.
_POSITIONS = "compute_3d_position_ids"
_WAY_OUT = "Call ifkv.generate(model, cache, prompt_ids)"


class Rows(Protocol):
    """Tokens and positions of a cache's rows; attributes as in `StitchedCache`."""

    token_ids: Tensor
    prompt_ids: Tensor | None
    positions: Tensor
    plain: bool
    axes: int

    @property
    def geometry(self) -> str:
        """Return the geometry's name."""


def check_given(cache: Rows, asking: FrameType, rows: int) -> None:
    """Refuse a sequence that does not continue the cache.

    Args:
        cache: The cache that is asked for its length.
        asking: The calling frame; nothing is checked unless it is the prefill of ``generate()``, or
            a forward that makes positions because it was given none.
        rows: The cache's length.

    Raises:
        InvalidInputError: The tokens neither begin with those of the cache's rows, nor come with
            a mask over rows and tokens; or a setting makes them impossible to check.
    """
    if asking.f_code.co_name == _POSITIONS and cache.axes > 1:
        _check_remembered(cache, asking.f_locals.get("self"))
    if asking.f_code.co_name != _PREFILL:
        return
    found = asking.f_locals
    ids, config, kwargs = found["input_ids"], found["generation_config"], found["model_kwargs"]
    if kwargs.get("inputs_embeds") is not None:
        raise InvalidInputError(
            "generate() was given inputs_embeds beside a stitched cache, which cannot be held "
            f"against its context's tokens. {_WAY_OUT}."
        )
    if config.prefill_chunk_size is not None:
        raise InvalidInputError(
            f"prefill_chunk_size is {config.prefill_chunk_size}, whose chunks would begin with the "
            f"context that the stitched cache holds. {_WAY_OUT}, or set it to None."
        )
    mask = kwargs.get("attention_mask")
    seen = getattr(config, "_mask_length", -1) if mask is None else mask.shape[1]
    length = ids.shape[1]
    if seen == length:
        if length <= rows or not _begins_with(ids, cache, rows):
            raise InvalidInputError(
                f"generate() was given {length} tokens that do not continue the {rows} rows of the "
                "stitched cache; it takes the tokens of context and prompt together, and cuts the "
                f"context off. {_WAY_OUT}, or give it torch.cat((cache.token_ids, prompt_ids))."
            )
    elif seen != rows + length:
        raise InvalidInputError(
            f"generate() was given {length} tokens and an attention mask of {seen} beside a "
            f"stitched cache of {rows} rows; the mask has to cover all {rows + length}. {_WAY_OUT}."
        )
    if mask is not None and not bool(mask[:, :rows].all()):
        raise InvalidInputError(
            f"the attention mask hides some of the {rows} rows of the stitched cache, whose "
            f"positions generate() would count without them. {_WAY_OUT}, or stitch the documents "
            "that are meant."
        )
    _check_positions(cache, kwargs.get("position_ids"))


def _begins_with(ids: Tensor, cache: Rows, rows: int) -> bool:
    """True if every sequence begins with the known tokens of the cache's rows."""
    known = cache.token_ids
    if cache.prompt_ids is not None and rows == len(known) + len(cache.prompt_ids):
        known = torch.cat((known, cache.prompt_ids))
    return bool((ids[:, : len(known)] == known.to(ids.device)).all())


def _check_remembered(cache: Rows, module: Any) -> None:
    """Refuse a forward whose positions would be those of an earlier request, or those of slots."""
    remembered = getattr(module, "rope_deltas", None)
    if not cache.plain or (remembered is not None and bool((remembered != 0).any())):
        raise InvalidInputError(
            "the model was given no position_ids beside a stitched cache, and would count them "
            f"from an earlier request or from slots. {_WAY_OUT}, or give it the last of "
            "position_ids=cache.positions_with(rows)."
        )


def _check_positions(cache: Rows, positions: Any) -> None:
    """Refuse positions that differ from those of the cache's rows."""
    several = cache.axes > 1
    if (cache.plain and not several) or cache.geometry != "global":
        return  # another geometry is refused as its rows are appended
    if positions is None and not several:
        return
    own = cache.positions
    if several and positions is not None and positions.ndim == 3:
        own = own.expand(cache.axes, -1)[:, None]
        positions = positions[-cache.axes :]  # the first of one more is that of slots
    length = own.shape[-1]
    if (
        positions is None
        or positions.shape[-1] < length
        or not bool((positions[..., :length] == own.to(positions.device)).all())
    ):
        raise InvalidInputError(
            "the stitched cache's rows do not stand where their slots are, as generate() takes "
            f"them to. {_WAY_OUT}."
        )
