"""Checks of the lists that describe several requests: one entry each, one cache each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    from ifkv.cache.stitched import StitchedCache


def check_counts(count: int, **given: Sequence[Any]) -> None:
    """Refuse lists that do not have one entry for each request.

    Raises:
        InvalidInputError: One has more or fewer.
    """
    for name, values in given.items():
        if isinstance(values, str | Mapping | AbstractSet) or not hasattr(values, "__len__"):
            raise InvalidInputError(
                f"{name} is of type {type(values).__name__}; a list with one entry for each of the "
                f"{count} requests is wanted."
            )
        if len(values) != count:
            raise InvalidInputError(
                f"{name} has {len(values)} entries for {count} requests; give one each."
            )


def check_private(caches: Sequence[StitchedCache]) -> None:
    """Refuse one cache for two requests that would both write into it.

    Raises:
        InvalidInputError: A cache is there twice.
    """
    seen: dict[int, int] = {}
    for index, cache in enumerate(caches):
        first = seen.setdefault(id(cache), index)
        if first != index:
            raise InvalidInputError(
                f"requests {first} and {index} have the same cache, but each writes into its own; "
                "stitch one for each (documents may be shared)."
            )
