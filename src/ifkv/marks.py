"""A mark on the keys that a stitched cache hands out.

A layer's keys go straight from its cache to the attention function, which sees neither. The mark
tells that function whose keys they are, without a hook on any module that could be left behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_NAME = "_ifkv_stitched"


def mark_stitched(keys: Tensor) -> Tensor:
    """Mark keys as a stitched cache's; slices and copies of them are not marked."""
    setattr(keys, _NAME, True)
    return keys


def is_stitched(keys: Tensor) -> bool:
    """Whether these keys came straight from a stitched cache."""
    return getattr(keys, _NAME, False)
