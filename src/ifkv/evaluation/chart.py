"""One plot of quality against cost, laid out in pixels; the page's template draws it as SVG."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 52, 30, 14, 46
COLOURS, MARKERS, DASHES = 8, 5, 3
# Pixels between the letters at the ends of two lines.
_APART = 13.0


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured point, in the data's units.

    Attributes:
        x: Cost.
        y: Quality.
        low: Lower end of its interval; not finite where there is none.
        high: Upper end.
        title: What it says when pointed at.
    """

    x: float
    y: float
    low: float
    high: float
    title: str


@dataclasses.dataclass(frozen=True)
class Line:
    """The points of one way of answering.

    Attributes:
        number: Decides letter, colour, marker and dashes.
        name: The way.
        points: In the order they are joined.
        ceiling: Whether it knows what a request cannot, and is drawn as a reference.
    """

    number: int
    name: str
    points: Sequence[Point]
    ceiling: bool = False

    @property
    def letter(self) -> str:
        """A, B, ..., Z, AA, AB, ..."""
        letters, rest = "", self.number + 1
        while rest:
            rest, last = divmod(rest - 1, 26)
            letters = chr(ord("A") + last) + letters
        return letters

    @property
    def style(self) -> str:
        """Classes of its colour and dashes; no two of the first 120 lines look the same."""
        if self.ceiling:
            return "line ceiling"
        return f"line c{self.number % COLOURS} d{self.number // COLOURS % DASHES}"

    @property
    def marker(self) -> str:
        """An SVG path around the origin."""
        return _MARKERS[self.number % MARKERS]


_MARKERS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "M-3.6,-3.6h7.2v7.2h-7.2z",
    "M0,-4.8L4.6,3.4H-4.6z",
    "M0,-5.2L4.6,0L0,5.2L-4.6,0z",
    "M0,4.8L4.6,-3.4H-4.6z",
)


@dataclasses.dataclass(frozen=True)
class Chart:
    """A plot.

    Attributes:
        title: What is plotted.
        hint: Which direction is better, and what the unit is.
        lines: The ways of answering.
        levels: Names and values of the horizontal lines.
        percent: Whether y is shown in percent.
    """

    title: str
    hint: str
    lines: Sequence[Line]
    levels: Sequence[tuple[str, float]]
    percent: bool = False

    @property
    def x_range(self) -> tuple[float, float]:
        """From 0 to a little beyond the costliest point."""
        return 0.0, 1.06 * max([p.x for line in self.lines for p in line.points] or [1.0])

    @property
    def y_range(self) -> tuple[float, float]:
        """Around all points and levels; intervals that reach further are cut off there."""
        values = [p.y for line in self.lines for p in line.points]
        values += [value for _, value in self.levels]
        low, high = min(values), max(values)
        room = 0.08 * (high - low) or 0.1
        return low - room, high + room

    def x(self, value: float) -> float:
        """Pixels from the left."""
        low, high = self.x_range
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Pixels from the top, within the plot."""
        low, high = self.y_range
        value = min(max(value, low), high)
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Pixels and texts."""
        return [(self.x(value), f"{value:.4g}") for value in ticks(*self.x_range)]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Pixels and texts."""
        return [
            (self.y(value), f"{100 * value:.4g} %" if self.percent else f"{value:.4g}")
            for value in ticks(*self.y_range)
        ]

    @property
    def ends(self) -> list[tuple[Line, float, float]]:
        """Where each line's letter stands: behind its last point, none on top of another."""
        placed: list[tuple[Line, float, float]] = []
        drawn = [line for line in self.lines if line.points]
        for line in sorted(drawn, key=lambda line: self.y(line.points[-1].y)):
            x, y = self.x(line.points[-1].x) + 12, self.y(line.points[-1].y) + 4
            moved = True
            while moved:
                moved = False
                for _, other_x, other_y in placed:
                    if abs(other_x - x) < _APART and abs(other_y - y) < _APART - 0.1:
                        y, moved = round(other_y + _APART, 1), True
            placed.append((line, round(x, 1), round(y, 1)))
        return placed


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within a range, ascending.

    >>> ticks(0.03, 0.98)
    [0.2, 0.4, 0.6, 0.8]
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(number * step, digits) for number in range(first, last + 1)]
