"""Encodings to compare: documents alone, or behind a surrogate context."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from ifkv.documents.surrogate_text import DEFAULT, SURROGATE_TEXT
from ifkv.errors import InvalidInputError

# The name of documents that are encoded alone.
NONE = "none"


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Way of encoding documents: behind a text that is then dropped, or the mean over several.

    Attributes:
        name: Name in results; it should say which texts they are.
        texts: The texts.
    """

    name: str
    texts: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def encodings_of(specs: Sequence[str]) -> list[Encoding | None]:
    """Return the encodings that strings name.

    Args:
        specs: For each encoding ``"none"`` for documents that are encoded alone; or a text file,
            or ``"default"`` for the text that ifkv ships; or several of these, joined by ``+``, for
            the mean over their texts.

    Returns:
        One for each string; None for ``"none"``. The name holds the files' names and the beginning
        of a hash of the texts, so that results of another text are never taken for these.

    Raises:
        InvalidInputError: A file is missing, empty or no text, or two strings name the same texts.
    """
    found: list[Encoding | None] = []
    for spec in specs:
        if spec == NONE:
            found.append(None)
            continue
        names = spec.split("+")
        texts = tuple(_text(name) for name in names)
        digest = hashlib.sha256("\0".join(sorted(texts)).encode()).hexdigest()[:6]
        found.append(Encoding("+".join(Path(name).stem for name in names) + f"-{digest}", texts))
    shown = [NONE if one is None else one.name for one in found]
    for name in shown:
        if shown.count(name) > 1:
            raise InvalidInputError(f"surrogate {name} is given twice; give each once.")
    return found


def _text(name: str) -> str:
    if name == DEFAULT:
        return SURROGATE_TEXT
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InvalidInputError(
            f"surrogate {name!r} cannot be read ({reason}); give text files, joined by + for "
            f"the mean over several, or {NONE}."
        ) from error
    if not text.strip():
        raise InvalidInputError(f"surrogate {name!r} has no text; give a file that has some.")
    return text
