"""Means, pooled shares and paired differences over questions, with bootstrap intervals.

Questions are drawn with replacement (Efron 1979, the percentile interval), the same ones for every
way of answering, so that the difficulty of a question cancels in a difference. Resamples are kept
as counts of how often each question was drawn, so that every statistic is a matrix product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ifkv.errors import InvalidInputError
from ifkv.utils.checks import check_positive

Values = NDArray[np.float64]

# Added to both sides of a ratio of KLs, in nats. Below it, both answers are as good as full
# prefill's, and it does not matter which is nearer.
NEGLIGIBLE = 1e-3
RESAMPLES = 4000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimate of a number, with its interval.

    Attributes:
        value: Value over all questions.
        low: Lower end of the interval.
        high: Upper end.
        count: Number of questions.
    """

    value: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """True if the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


class Bootstrap:
    """Bootstrap resamples of questions.

    Args:
        count: Number of questions.
        resamples: Number of resamples.
        seed: Seed of the draws.

    Examples:
        >>> import numpy as np
        >>> half = Bootstrap(4).mean(np.array([0.0, 1.0, 0.0, 1.0]))
        >>> half.value, half.low <= 0.5 <= half.high
        (0.5, True)
    """

    def __init__(self, count: int, *, resamples: int = RESAMPLES, seed: int = 0):
        check_positive(count, "the number of questions")
        check_positive(resamples, "the number of resamples")
        self.count = count
        draws = np.random.default_rng(seed)
        # How often each question was drawn, [resamples, count].
        self._times = draws.multinomial(count, [1 / count] * count, size=resamples).astype(float)

    def mean(self, values: Values) -> Estimate:
        """Return the mean of one value per question, ``[count]``."""
        return self.of(lambda sums: sums[:, 0] / sums[:, 1], values, np.ones(self.count))

    def difference(self, first: Values, second: Values) -> Estimate:
        """Return the mean of ``first - second``, question by question."""
        return self.mean(self._checked(first) - self._checked(second))

    def gap_share(self, values: Values, stitched: Values, full: Values) -> Estimate:
        """Return the share of the gap between stitching alone and full prefill that a way recovers.

        0 is stitching alone, 1 a full prefill. Sums over questions are taken before the division,
        so a question without a gap neither counts nor divides by zero. The sign of a metric
        cancels. NaN if there is no gap.
        """

        def share(sums: Values) -> Values:
            gap = sums[:, 1] - sums[:, 2]
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.where(gap == 0, np.nan, (sums[:, 1] - sums[:, 0]) / gap)

        return self.of(share, values, stitched, full)

    def gap_share_difference(
        self, first: Values, second: Values, stitched: Values, full: Values
    ) -> Estimate:
        """Return how much more of the gap the first way recovers than the second."""

        def share(sums: Values) -> Values:
            gap = sums[:, 2] - sums[:, 3]
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.where(gap == 0, np.nan, (sums[:, 1] - sums[:, 0]) / gap)

        return self.of(share, first, second, stitched, full)

    def typical_ratio(self, first: Values, second: Values) -> Estimate:
        """Return by what factor ``first`` is larger than ``second`` on a typical question.

        This is the geometric mean of the questions' ratios. One question with huge values would
        decide a ratio of sums; here it counts like any other.

        Args:
            first: One value per question, not negative.
            second: One value per question, not negative.

        >>> one, two = np.array([2.0, 2.0, 900.0]), np.array([4.0, 4.0, 9.0])
        >>> round(Bootstrap(3).typical_ratio(one, two).value, 1)
        2.9
        """
        logs = np.log(self._checked(first) + NEGLIGIBLE) - np.log(
            self._checked(second) + NEGLIGIBLE
        )
        return self.of(lambda sums: np.exp(sums[:, 0] / sums[:, 1]), logs, np.ones(self.count))

    def of(self, statistic: Callable[[Values], Values], *columns: Values) -> Estimate:
        """Return the estimate of any function of sums over questions.

        Args:
            statistic: Function from sums ``[n, columns]`` to ``[n]``, row by row.
            *columns: One value per question each, ``[count]``.

        Returns:
            The estimate; resamples for which the statistic is not finite are left out.

        Raises:
            InvalidInputError: A column has another length, or holds NaN or infinity.
        """
        table = np.stack([self._checked(column) for column in columns], axis=1)
        value = float(statistic(table.sum(axis=0, keepdims=True))[0])
        sampled = statistic(self._times @ table)
        sampled = sampled[np.isfinite(sampled)]
        if len(sampled) == 0:
            return Estimate(value, float("nan"), float("nan"), self.count)
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(sampled, [tail, 1 - tail])
        return Estimate(value, float(low), float(high), self.count)

    def _checked(self, column: Values) -> Values:
        values = np.asarray(column, dtype=np.float64)
        if values.shape != (self.count,) or not np.isfinite(values).all():
            raise InvalidInputError(
                f"values have shape {values.shape} and {int((~np.isfinite(values)).sum())} of them "
                f"are not finite; give one finite value for each of {self.count} questions."
            )
        return values


def at_costs(costs: Values, quality: Values, wanted: Values) -> Values:
    """Return the quality at given costs, question by question, between measured points.

    Points are joined by straight lines. A point on the line between two ways is the average cost
    and quality of answering some requests in one way and the others in the other.

    Args:
        costs: Cost of each measured point, ``[questions, points]``, in any order.
        quality: Quality of each measured point, likewise.
        wanted: Costs to interpolate at, ``[questions]``.

    Returns:
        ``[questions]``; NaN where a cost lies outside the measured range.

    >>> at_costs(np.array([[0.0, 1.0]]), np.array([[4.0, 2.0]]), np.array([0.25]))
    array([3.5])
    """
    order = np.argsort(costs, axis=1, kind="stable")
    x, y = np.take_along_axis(costs, order, 1), np.take_along_axis(quality, order, 1)
    rows = np.arange(len(x))
    right = np.clip((x < wanted[:, None]).sum(axis=1), 1, x.shape[1] - 1)
    left = right - 1
    width = x[rows, right] - x[rows, left]
    share = np.where(width > 0, (wanted - x[rows, left]) / np.where(width > 0, width, 1), 0.0)
    found = y[rows, left] + share * (y[rows, right] - y[rows, left])
    outside = (wanted < x[:, 0]) | (wanted > x[:, -1])
    return np.where(outside, np.nan, found)
