"""What a backend is told besides tensors: plans, and the scales of 8-bit rows."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

from torch import Tensor

Reduction = Literal["l2", "sum"]


class KVScales(NamedTuple):
    """What a layer's keys and values have been divided by to fit their dtype: powers of two.

    Attributes:
        keys: Of the keys.
        values: Of the values.
    """

    keys: float = 1.0
    values: float = 1.0


UNSCALED = KVScales()
_TAG = "_ifkv_stitched"


def tag_stitched(keys: Tensor, scales: KVScales | None = None) -> Tensor:
    """Tag the keys that a stitched cache hands out, and return them.

    A layer's keys go straight from its cache to the attention function, which is not told whose
    they are. The tag tells it without a hook on any module. Slices and copies have no tag.

    Args:
        keys: Keys of one layer.
        scales: Scales of its keys and values if they are 8-bit.
    """
    setattr(keys, _TAG, scales or True)
    return keys


def is_stitched(keys: Tensor) -> bool:
    """True if these keys came straight from a stitched cache."""
    return getattr(keys, _TAG, None) is not None


def scales_of(keys: Tensor) -> KVScales | None:
    """Return the scales of a stitched cache's 8-bit keys and values; None for all other keys."""
    tag: KVScales | bool = getattr(keys, _TAG, True)
    return None if isinstance(tag, bool) else tag


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Rows of one forward over a stitched cache, planned once and used in every layer.

    Attributes:
        slots: Cache slot of each row, long ``[rows]``, ascending, on the compute device. In the
            GLOBAL geometry a slot is its position: row i sees slots 0 to ``slots[i]``.
        kv_length: Slots in use once the rows' own keys have been written.
        detail: What the backend has prepared.
    """

    slots: Tensor
    kv_length: int
    detail: Any


@dataclasses.dataclass(frozen=True)
class DocumentPlan:
    """Documents of one ragged forward.

    Attributes:
        lengths: Rows of each document; they follow one another in the batch.
        prefix_length: Tokens of the prefix that every document sees.
        detail: What the backend has prepared.
    """

    lengths: tuple[int, ...]
    prefix_length: int
    detail: Any


@dataclasses.dataclass(frozen=True)
class QueryPlan:
    """Query tokens over a whole context.

    Attributes:
        query_positions: Long ``[Q]``, on the compute device.
        context_positions: Long ``[T]``, on the compute device.
        detail: What the backend has prepared.
    """

    query_positions: Tensor
    context_positions: Tensor
    detail: Any


@dataclasses.dataclass(frozen=True)
class QueriesPlan:
    """Query tokens of several requests, each over a context of its own.

    Attributes:
        parts: Of each request; their query tokens follow one another.
        detail: What the backend has prepared for all of them together.
    """

    parts: tuple[QueryPlan, ...]
    detail: Any

    @property
    def counts(self) -> list[int]:
        """Query tokens of each request."""
        return [len(part.query_positions) for part in self.parts]
