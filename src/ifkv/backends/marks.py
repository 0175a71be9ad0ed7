"""A mark on the keys that a stitched cache hands out.

A layer's keys go straight from its cache to the attention function, which sees neither. The mark
tells that function whose keys they are, without a hook on any module that could be left behind, and
by which scales to read them where they are in 8 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ifkv.backends.plans import KVScales

_NAME = "_ifkv_stitched"


def mark_stitched(keys: Tensor, scales: KVScales | None = None) -> Tensor:
    """Mark keys as a stitched cache's; slices and copies of them are not marked.

    Args:
        keys: What a cache layer hands out.
        scales: Of keys and values, if they are in 8 bits.
    """
    setattr(keys, _NAME, scales or True)
    return keys


def is_stitched(keys: Tensor) -> bool:
    """Whether these keys came straight from a stitched cache."""
    return getattr(keys, _NAME, None) is not None


def scales_of(keys: Tensor) -> KVScales | None:
    """Scales of a stitched cache's keys and values in 8 bits; None of any others."""
    mark: KVScales | bool = getattr(keys, _NAME, True)
    return None if isinstance(mark, bool) else mark
