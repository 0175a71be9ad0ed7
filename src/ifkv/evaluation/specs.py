"""Lists on a command line."""

from __future__ import annotations

import re

from ifkv.errors import InvalidInputError

# A piece like "query=prompt" is a further option of the selector before it. A piece without "=", or
# with a ":" before it, names the next selector.
_OPTION = re.compile(r"[^:=]+=")


def split_specs(text: str) -> list[str]:
    """Return the selectors of a text that separates them, and their options, by commas.

    Args:
        text: Names with their options; may be empty.

    Raises:
        InvalidInputError: The text starts with an option.

    >>> split_specs("attention-norm:layers=0-1,query=prompt,epic,random:seed=1")
    ['attention-norm:layers=0-1,query=prompt', 'epic', 'random:seed=1']
    """
    specs: list[str] = []
    for piece in (part.strip() for part in re.split("[,;]", text)):
        if not piece:
            continue
        if not _OPTION.match(piece):
            specs.append(piece)
        elif specs and ":" in specs[-1]:
            specs[-1] += f",{piece}"
        else:
            raise InvalidInputError(
                f"{piece!r} in {text!r} is an option without a selector; options follow a name and "
                "a colon, as in attention-norm:query=prompt."
            )
    return specs


def numbers(text: str) -> list[float]:
    """Return the numbers of a text, which separates them by commas.

    Raises:
        InvalidInputError: There is no number, or a part is not one.

    >>> numbers(".05, .15")
    [0.05, 0.15]
    """
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InvalidInputError(
            f"{text!r} is not a list of numbers ({error}); write for example .05,.15."
        ) from error
    if not found:
        raise InvalidInputError("there is no number; write for example .05,.15.")
    return found
