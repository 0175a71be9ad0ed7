"""Budgets as text: read from a command line, and labelled in tables."""

from __future__ import annotations

from typing import Any

from ifkv.errors import InvalidInputError
from ifkv.selectors import Budget

_HOW = (
    "write a ratio, number=N or mass=SHARE, and behind it +cap=RATIO (of mass), +window=N or "
    "+sentences: .15+sentences, number=200, mass=.5+cap=.3"
)


def parse_budgets(text: str) -> list[Budget]:
    """Return the budgets in a text, which separates them by commas.

    Raises:
        InvalidInputError: A part is not a budget, or its values are not allowed.

    Examples:
        >>> [label(one) for one in parse_budgets(".15+sentences, number=200, mass=.5+cap=.3")]
        ['0.15+sentences', 'number=200', 'mass=0.5+cap=0.3']
    """
    return [_budget(part.strip()) for part in text.split(",") if part.strip()]


def _budget(text: str) -> Budget:
    given: dict[str, Any] = {}
    for place, piece in enumerate(text.split("+")):
        name, _, value = (part.strip() for part in piece.partition("="))
        if place == 0 and not value:
            name, value = "ratio", name
        allowed = ("ratio", "number", "mass") if place == 0 else ("cap", "window", "sentences")
        if name not in allowed or name in given or (name == "sentences") == bool(value):
            raise InvalidInputError(f"{piece!r} in the budget {text!r} is not understood; {_HOW}.")
        try:
            given[name] = (
                True
                if name == "sentences"
                else int(value)
                if name in ("number", "window")
                else float(value)
            )
        except ValueError as error:
            raise InvalidInputError(f"the budget {text!r}: {error}; {_HOW}.") from error
    return Budget(**given)


def amount(budget: Budget) -> float:
    """Return the amount of a budget: its ratio, number of slots, or share of the mass."""
    found = next(n for n in (budget.ratio, budget.number, budget.mass) if n is not None)
    return float(found)


def kind(budget: Budget) -> str:
    """Return the kind of a budget, without its amount; empty for a plain ratio.

    >>> kind(Budget(mass=0.5, cap=0.3)), kind(Budget(ratio=0.15, window=5)), kind(Budget.of(0.1))
    ('mass+cap=0.3', '+window=5', '')
    """
    text = "number" if budget.number is not None else "mass" if budget.mass is not None else ""
    if budget.cap != 1:
        text += f"+cap={budget.cap:g}"
    if budget.window is not None:
        text += f"+window={budget.window}"
    return text + ("+sentences" if budget.sentences else "")


def label(budget: Budget) -> str:
    """Return a budget as `parse_budgets` reads it; a plain ratio is its number."""
    found = kind(budget)
    number = f"{amount(budget):g}" if budget.number is None else str(budget.number)
    head, plus, rest = found.partition("+")
    return (f"{head}={number}" if head else number) + plus + rest
