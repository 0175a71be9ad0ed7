"""Lists as a command line gives them."""

from __future__ import annotations

import re

from ifkv.errors import InvalidInputError

# A piece like "query=prompt" goes on with the options of the selector before it; a piece with no
# "=", or a ":" before it, names the next selector.
_OPTION = re.compile(r"[^:=]+=")


def split_specs(text: str) -> list[str]:
    """Selectors separated by commas, some of which have options separated by commas.

    Args:
        text: Names with their options, or an empty text.

    Raises:
        InvalidInputError: It starts with an option.

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
    """Numbers separated by commas.

    Raises:
        InvalidInputError: There is none, or something else among them.

    >>> numbers(".05, .15")
    [0.05, 0.15]
    """
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InvalidInputError(
            f"{text!r} is no list of numbers ({error}); write for example .05,.15."
        ) from error
    if not found:
        raise InvalidInputError("there is no number; write for example .05,.15.")
    return found
