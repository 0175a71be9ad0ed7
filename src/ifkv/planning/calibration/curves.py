"""Interpolation between measured points."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Curve:
    """Seconds as a function of a size: linear between the points and beyond the last.

    This is exact where time is an overhead plus a cost per row. Below the first point, the first
    point's value holds. With a single point, time grows in proportion to the size.

    Attributes:
        sizes: Measured sizes, ascending and positive.
        seconds: One time per size, positive.

    >>> curve = Curve((1, 11), (2.0, 12.0))
    >>> curve.at(6), curve.at(21), curve.at(0.5)
    (7.0, 22.0, 2.0)
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, size: float) -> float:
        """Return the seconds at a size."""
        if size <= self.sizes[0]:
            return self.seconds[0]
        if len(self.sizes) == 1:
            return self.seconds[0] * size / self.sizes[0]
        right = min(max(bisect.bisect_left(self.sizes, size), 1), len(self.sizes) - 1)
        x, y = self.sizes[right - 1 : right + 1], self.seconds[right - 1 : right + 1]
        # Noise may have made a larger size look faster; time does not fall beyond it.
        slope = (
            max(0.0, (y[1] - y[0]) / (x[1] - x[0]))
            if size > x[1]
            else (y[1] - y[0]) / (x[1] - x[0])
        )
        return y[0] + slope * (size - x[0])


@dataclasses.dataclass(frozen=True)
class Grid:
    """Operations per second as a function of two sizes: linear in the logarithms, constant outside.

    Attributes:
        rows: Values of the first size, ascending and positive.
        columns: Values of the second size, likewise.
        rates: One row of positive rates per first size.

    >>> round(Grid((1.0, 4.0), (1.0,), ((10.0,), (40.0,))).at(2, 7), 6)
    20.0
    """

    rows: tuple[float, ...]
    columns: tuple[float, ...]
    rates: tuple[tuple[float, ...], ...]

    def at(self, row: float, column: float) -> float:
        """Return the operations per second."""
        (top, bottom, down), (left, right, across) = (
            _between(self.rows, row),
            _between(self.columns, column),
        )
        logs = [
            (1 - across) * math.log(self.rates[r][left]) + across * math.log(self.rates[r][right])
            for r in (top, bottom)
        ]
        return math.exp((1 - down) * logs[0] + down * logs[1])


def _between(points: Sequence[float], value: float) -> tuple[int, int, float]:
    """Return the neighbours of a value, and how far it is from the first to the second."""
    if value <= points[0]:
        return 0, 0, 0.0
    if value >= points[-1]:
        return len(points) - 1, len(points) - 1, 0.0
    right = bisect.bisect_left(points, value)
    share = math.log(value / points[right - 1]) / math.log(points[right] / points[right - 1])
    return right - 1, right, share
