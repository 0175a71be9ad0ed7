"""Plot of quality against cost, laid out in pixels; the page's template draws it as SVG."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 52, 30, 14, 46
COLOURS, MARKERS, DASHES = 8, 5, 3
# Least distance in pixels between the letters at the ends of two lines.
_APART = 13.0


@dataclasses.dataclass(frozen=True)
class Point:
    """Measured point, in the data's units.

    Attributes:
        x: Cost.
        y: Quality.
        low: Lower end of its interval; not finite if there is none.
        high: Upper end.
        title: Text shown when the mouse is on it.
    """

    x: float
    y: float
    low: float
    high: float
    title: str


@dataclasses.dataclass(frozen=True)
class Line:
    """Line of one way of answering.

    Attributes:
        number: Number that gives letter, colour, marker and dashes.
        name: Name of the way.
        points: Points, in the order in which they are joined.
        ceiling: True if the way knows what a request cannot; it is drawn as a reference.
    """

    number: int
    name: str
    points: Sequence[Point]
    ceiling: bool = False

    @property
    def letter(self) -> str:
        """Return the line's letter: A, B, ..., Z, AA, AB, ..."""
        letters, rest = "", self.number + 1
        while rest:
            rest, last = divmod(rest - 1, 26)
            letters = chr(ord("A") + last) + letters
        return letters

    @property
    def style(self) -> str:
        """Return the CSS classes of its colour and dashes; the first 120 lines all differ."""
        if self.ceiling:
            return "line ceiling"
        return f"line c{self.number % COLOURS} d{self.number // COLOURS % DASHES}"

    @property
    def marker(self) -> str:
        """Return the marker, an SVG path around the origin."""
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
    """Plot of one metric against cost.

    Attributes:
        title: Name of the metric.
        hint: Note on which direction is better, and the unit.
        lines: The ways of answering.
        levels: Names and values of the horizontal lines.
        percent: True if y is shown in percent.
    """

    title: str
    hint: str
    lines: Sequence[Line]
    levels: Sequence[tuple[str, float]]
    percent: bool = False

    @property
    def x_range(self) -> tuple[float, float]:
        """Return the range of x: from 0 to a little beyond the costliest point."""
        return 0.0, 1.06 * max([p.x for line in self.lines for p in line.points] or [1.0])

    @property
    def y_range(self) -> tuple[float, float]:
        """Return the range of y, around all points and levels; longer intervals are cut off."""
        values = [p.y for line in self.lines for p in line.points]
        values += [value for _, value in self.levels]
        low, high = min(values), max(values)
        room = 0.08 * (high - low) or 0.1
        return low - room, high + room

    def x(self, value: float) -> float:
        """Return a cost in pixels from the left."""
        low, high = self.x_range
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Return a quality in pixels from the top, within the plot."""
        low, high = self.y_range
        value = min(max(value, low), high)
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Return the position in pixels and the text of each tick."""
        return [(self.x(value), f"{value:.4g}") for value in ticks(*self.x_range)]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Return the position in pixels and the text of each tick."""
        return [
            (self.y(value), f"{100 * value:.4g} %" if self.percent else f"{value:.4g}")
            for value in ticks(*self.y_range)
        ]

    @property
    def ends(self) -> list[tuple[Line, float, float]]:
        """Return the position of each line's letter: after its last point, without overlaps."""
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
    """Return round numbers within a range, ascending.

    >>> ticks(0.03, 0.98)
    [0.2, 0.4, 0.6, 0.8]
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(number * step, digits) for number in range(first, last + 1)]
