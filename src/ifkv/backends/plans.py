"""Plans of a forward, and the tags and scales that a stitched cache puts on its keys."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

from torch import Tensor

Reduction = Literal["l2", "sum"]


class KVScales(NamedTuple):
    """Scales of a layer's FP8 keys and values: powers of two by which they were divided.

    Attributes:
        keys: Scale of the keys.
        values: Scale of the values.
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
    """Plan of the rows of one forward over stitched caches, used in every layer.

    Attributes:
        slots: Cache slot of each row, long ``[rows]``, ascending within a request, on the compute
            device. Row i sees slots 0 to ``slots[i]`` of its request.
        kv_length: Largest number of slots in use of a request, after the rows' keys are written.
        detail: Data of the backend.
    """

    slots: Tensor
    kv_length: int
    detail: Any


@dataclasses.dataclass(frozen=True)
class DocumentPlan:
    """Plan of the documents of one ragged forward.

    Attributes:
        lengths: Rows of each document; documents are concatenated.
        prefix_length: Tokens of the prefix that every document sees.
        detail: Data of the backend.
    """

    lengths: tuple[int, ...]
    prefix_length: int
    detail: Any


@dataclasses.dataclass(frozen=True)
class QueryPlan:
    """Plan of one request's query tokens over its context.

    Attributes:
        query_positions: Long ``[Q]``, on the compute device.
        context_positions: Long ``[T]``, on the compute device.
        detail: Data of the backend.
    """

    query_positions: Tensor
    context_positions: Tensor
    detail: Any


@dataclasses.dataclass(frozen=True)
class QueriesPlan:
    """Plan of the query tokens of several requests, each over its own context.

    Attributes:
        parts: Plan of each request; their query tokens are concatenated.
        detail: Data of the backend for all requests together.
    """

    parts: tuple[QueryPlan, ...]
    detail: Any

    @property
    def counts(self) -> list[int]:
        """Return the number of query tokens of each request."""
        return [len(part.query_positions) for part in self.parts]
