"""Sources of documents: a title for people, and the place to look it up."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ifkv.errors import InvalidInputError
from ifkv.utils.listing import as_list


@dataclasses.dataclass(frozen=True)
class Source:
    """Source of a document: kept beside the document and never read by the model.

    ``str(source)`` is a line for people, such as ``ferry.md, page 3 (2 of 5)``.

    Attributes:
        title: Its name for people.
        location: Its path or URL.
        page: Its page, from 1.
        line: The line that it begins at, from 1. Pieces of a text have the text's own if one was
            given (that of a JSONL file, say), else theirs within it.
        offset: Characters before it in the text that it was cut from.
        part: Number of the piece, from 1, and how many pieces the text has; None if uncut.

    Raises:
        InvalidInputError: There is neither a title nor a location, or a number is none.

    Examples:
        >>> from ifkv import Source
        >>> print(Source("ferry.md", "notes/ferry.md", page=3))
        ferry.md, page 3
    """

    title: str = ""
    location: str = ""
    page: int | None = None
    line: int | None = None
    offset: int | None = None
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("title", "location"):
            value: object = getattr(self, name)
            if not isinstance(value, str):
                raise InvalidInputError(f"{name} is {value!r}; a source's {name} is text.")
        if not (self.title.strip() or self.location.strip()):
            raise InvalidInputError(
                "a source has neither title nor location; give one, or None for no source."
            )
        for name, least in (("page", 1), ("line", 1), ("offset", 0)):
            number: object = getattr(self, name)
            if number is not None and (type(number) is not int or number < least):
                raise InvalidInputError(
                    f"{name} is {number!r}; a source's {name} is a whole number from {least}."
                )

    def __str__(self) -> str:
        line = "" if self.line is None else f":{self.line}"
        page = "" if self.page is None else f", page {self.page}"
        part = "" if self.part is None else f" ({self.part[0]} of {self.part[1]})"
        return f"{self.title or self.location}{line}{page}{part}"

    @property
    def place(self) -> str:
        """Return the place to look it up, as compilers write it: ``notes/ferry.md:12``."""
        return (self.location or self.title) + ("" if self.line is None else f":{self.line}")

    def piece(self, text: str, offset: int, part: tuple[int, int]) -> Source:
        """Return the source of a piece of this source's text.

        Args:
            text: The whole text.
            offset: Characters before the piece.
            part: As in `Source`.
        """
        line = text.count("\n", 0, offset) + 1 if self.line is None else self.line
        return dataclasses.replace(self, line=line, offset=offset, part=part)

    def to_json(self) -> str:
        """Return what `from_json` takes; equal sources give equal text."""
        given = {name: value for name, value in vars(self).items() if value not in ("", None)}
        return json.dumps(given, sort_keys=True)  # in ASCII: a file's name need not be UTF-8

    @classmethod
    def from_json(cls, text: str) -> Source:
        """Read what `to_json` wrote.

        Raises:
            ValueError: It is something else.
        """
        try:
            fields = json.loads(text)
            if part := fields.get("part"):
                number, count = map(int, part)
                fields["part"] = (number, count)
            return cls(**fields)
        except (TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{text[:80]!r} is no source") from error


def check_sources(sources: object, count: int) -> list[Source | None]:
    """Return one source per text from sources, titles, or None.

    Raises:
        InvalidInputError: They are not one per text, or something else.
    """
    if sources is None:
        return [None] * count
    given: list[Any] = as_list(
        sources, "sources", "give a list with a title or an ifkv.Source for each text"
    )
    if len(given) != count:
        raise InvalidInputError(
            f"sources has {len(given)} entries for {count} texts; give one for each."
        )
    for index, source in enumerate(given):
        if not (source is None or isinstance(source, str | Source)):
            raise InvalidInputError(
                f"sources[{index}] is of type {type(source).__name__}; give a title, an "
                "ifkv.Source, or None."
            )
    return [Source(source) if isinstance(source, str) else source for source in given]
