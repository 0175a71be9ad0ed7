"""Words that several commands print."""

from __future__ import annotations


def count(number: int, thing: str) -> str:
    """Return a number and what is counted: ``1 document``, ``2 documents``."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
