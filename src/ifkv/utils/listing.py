"""Checks of lists that callers give: texts, questions, keys, token ids or documents.

Many objects can be looped over and are not lists. A mapping yields its names, a table its columns,
a set its members in any order, a file its lines. Each would silently be taken for something else.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from ifkv.errors import InvalidInputError


def check_list(values: Any, what: str, wanted: str) -> None:
    """Raise if a value is not a list, even if it can be looped over.

    Lists, tuples, iterators, and arrays and series of one dimension pass.

    Args:
        values: The value.
        what: Its name, for the message.
        wanted: The way out, for the message, such as "give a list of documents".

    Raises:
        InvalidInputError: The value is not a list.
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
    """Return the entries of a value that passes `check_list`.

    Raises:
        InvalidInputError: The value is not a list.
    """
    check_list(values, what, wanted)
    return list(values)
