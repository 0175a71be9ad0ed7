"""Lists that callers give: of texts, of questions, of keys, of token ids, of documents.

Much can be looped over and is no list. A mapping gives its names, a table its columns, a set its
members in any order, a file its lines: each would be taken for something else without a word.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from ifkv.errors import InvalidInputError


def check_list(values: Any, what: str, wanted: str) -> None:
    """Refuse what is no list, though it may be possible to loop over it.

    Lists, tuples, generators, other iterators, and arrays and series of one dimension pass.

    Args:
        values: What was given.
        what: Its name, for the message.
        wanted: What should be given instead, as in "give a list of documents".

    Raises:
        InvalidInputError: It is none.
    """
    kind = type(values).__name__
    if isinstance(values, str):
        raise InvalidInputError(f"{what} is one string; {wanted}.")
    if isinstance(values, bytes | bytearray | memoryview):
        raise InvalidInputError(f"{what} is of type {kind}, which holds numbers; {wanted}.")
    if isinstance(values, io.IOBase):
        raise InvalidInputError(
            f"{what} is an open file, each line of which would be taken by itself; {wanted} "
            "([file.read()], say)."
        )
    if isinstance(values, AbstractSet):
        raise InvalidInputError(
            f"{what} is of type {kind}, which has no order; {wanted} (sorted({what}), say)."
        )
    dimensions = getattr(values, "ndim", None)
    named = isinstance(values, Mapping) or (dimensions is None and hasattr(values, "keys"))
    if named:
        raise InvalidInputError(
            f"{what} is of type {kind}, of which only the names would be taken; {wanted} "
            f"(list({what}.values()), say)."
        )
    if dimensions not in (None, 1):
        raise InvalidInputError(
            f"{what} is of type {kind}, with {dimensions} dimensions; {wanted} (of a table, "
            "one column)."
        )
    if not isinstance(values, Iterable):
        raise InvalidInputError(f"{what} is {values!r}; {wanted}.")


def as_list(values: Any, what: str, wanted: str) -> list[Any]:
    """Return the entries of what `check_list` lets pass.

    Raises:
        InvalidInputError: It is no list.
    """
    check_list(values, what, wanted)
    return list(values)
