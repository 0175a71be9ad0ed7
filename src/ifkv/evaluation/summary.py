"""Summary of an evaluation: quality and cost of every way, and paired differences."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ifkv.errors import InvalidInputError
from ifkv.evaluation.bootstrap import Bootstrap, Estimate, Values, at_costs
from ifkv.evaluation.results_log import Ledger
from ifkv.evaluation.summary_rows import FULL, Difference, SummaryRow
from ifkv.evaluation.ways import STITCH_ONLY

SOLVED_F1 = 0.5
# Two ways are not compared if a smaller share of the questions has a measured cost for both.
_COVERED = 0.9

Key = tuple[str, float]


class Summary:
    """Summary of a folder's results, by way.

    Args:
        ledger: The folder.
        seed: Seed of the resamples.
        solved: True to use only the questions that full prefill answers with an F1 of at least 0.5.
        only: Ids of the questions to use; all if None.

    Raises:
        InvalidInputError: No question is left.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        seed: int = 0,
        solved: bool = False,
        only: Sequence[str] | None = None,
    ):
        self._seed = seed
        self._results = {
            question: results
            for question, results in ledger.results.items()
            if f"{STITCH_ONLY} @0" in results
            and (not solved or ledger.references[question]["f1"] >= SOLVED_F1)
            and (only is None or question in only)
        }
        if not self._results:
            kind = " that full prefill solves" if solved else ""
            raise InvalidInputError(
                f"{ledger.folder} holds no finished question{kind}; there is nothing to summarise."
            )
        self._references = ledger.references
        keys: dict[Key, None] = {}
        self._texts: dict[Key, str] = {}  # names in the ledger
        self._budgets: dict[Key, str] = {}  # labels of the budget in tables
        self._plain: set[Key] = set()  # budgets that are a ratio, smoothed or not
        for results in self._results.values():
            for text, way in results.items():
                key = _key(way)
                keys[key] = None
                self._texts[key] = text
                self._budgets[key] = way.get("budget") or f"{key[1]:g}"
                if way["ratio"] is not None:
                    self._plain.add(key)
        self.keys = list(keys)

    @property
    def count(self) -> int:
        """Return the number of questions."""
        return len(self._results)

    @property
    def ways(self) -> list[str]:
        """Return the names of the ways that recompute, in the order in which they were measured."""
        return list(dict.fromkeys(way for way, _ in self.keys if way != STITCH_ONLY))

    def ratios(self, way: str) -> list[float]:
        """Return the ratios, numbers of slots or shares of mass of a way, ascending."""
        return sorted(ratio for name, ratio in self.keys if name == way)

    @functools.cached_property
    def rows(self) -> list[SummaryRow]:
        """Return the rows: full prefill, stitching alone, then every way by ratio."""
        named = [(way, ratio) for way in self.ways for ratio in self.ratios(way)]
        return [self._full(), *(self._row(key) for key in [(STITCH_ONLY, 0.0), *named])]

    def differences(self, *, equal_cost: bool = False) -> Iterator[Difference]:
        """Yield the difference of every pair of ways, at each of the first one's ratios.

        Args:
            equal_cost: True to compare at equal operations instead of equal ratio: with the other
                way's quality on the line between its measured points, of which stitching alone is
                one.
        """
        for first in self.ways:
            for ratio in self.ratios(first):
                if (first, ratio) in self._plain and ratio in (0.0, 1.0):
                    continue
                for second in self.ways:
                    if second == first:
                        continue
                    compare = self._at_equal_cost if equal_cost else self._at_equal_ratio
                    found = compare(first, second, ratio)
                    if found is not None:
                        yield found

    def best(self, ratio: float, exclude: Sequence[str] = ()) -> str | None:
        """Return the way that recovers most at a ratio, except ways that start with ``exclude``."""
        rows = [
            row
            for row in self.rows
            if row.ratio == ratio
            and row.way not in (FULL, STITCH_ONLY)
            and not row.way.startswith(tuple(exclude))
        ]
        return max(rows, key=lambda row: row.gap.value).way if rows else None

    def _bootstrap(self, count: int) -> Bootstrap:
        return _bootstrap(count, self._seed)

    def _questions(self, *keys: Key) -> list[str]:
        """Return the questions that were asked in all of these ways."""
        wanted = [self._texts[key] for key in keys]
        return [
            question
            for question, results in self._results.items()
            if all(key in results for key in wanted)
        ]

    def _column(self, key: Key, what: str, questions: Sequence[str]) -> Values:
        text = self._texts[key]
        values = [self._results[question][text][what] for question in questions]
        return np.array([np.nan if value is None else value for value in values], dtype=float)

    def _reference(self, what: str, questions: Sequence[str]) -> Values:
        return np.array([self._references[question][what] for question in questions], dtype=float)

    def _full(self) -> SummaryRow:
        questions = list(self._results)
        boot = self._bootstrap(len(questions))
        zero, one = np.zeros(len(questions)), np.ones(len(questions))
        stitched: Key = (STITCH_ONLY, 0.0)
        nll = self._reference("nll", questions)
        return SummaryRow(
            way=FULL,
            ratio=1.0,
            budget="1",
            count=len(questions),
            rows=1.0,
            flops=1.0,
            selecting=0.0,
            gap=boot.gap_share(zero, self._column(stitched, "kl", questions), zero),
            nll_gap=boot.gap_share(nll, self._column(stitched, "nll", questions), nll),
            kl=boot.mean(zero),
            top1=boot.mean(one),
            nll=boot.mean(nll),
            f1=boot.mean(self._reference("f1", questions)),
            em=boot.mean(self._reference("em", questions)),
        )

    def _row(self, key: Key) -> SummaryRow:
        questions = self._questions(key)
        boot = self._bootstrap(len(questions))
        full = self._reference("flops", questions).sum()
        context = self._reference("context", questions)
        stitched: Key = (STITCH_ONLY, 0.0)

        def column(what: str, of: Key = key) -> Values:
            return self._column(of, what, questions)

        def mean(what: str) -> Estimate | None:
            values = column(what)
            return None if np.isnan(values).any() else boot.mean(values)

        return SummaryRow(
            way=key[0],
            ratio=key[1] if key in self._plain else None,
            budget=self._budgets[key],
            count=len(questions),
            rows=float((column("rows") / context).mean()),
            flops=float(column("flops").sum() / full),
            selecting=float(column("selecting_flops").sum() / full),
            gap=boot.gap_share(column("kl"), column("kl", stitched), np.zeros(len(questions))),
            nll_gap=boot.gap_share(
                column("nll"), column("nll", stitched), self._reference("nll", questions)
            ),
            kl=boot.mean(column("kl")),
            top1=boot.mean(column("top1")),
            nll=boot.mean(column("nll")),
            f1=mean("f1"),
            em=mean("em"),
        )

    def _at_equal_ratio(self, first: str, second: str, ratio: float) -> Difference | None:
        keys: list[Key] = [(first, ratio), (second, ratio)]
        if not self._plain.issuperset(keys):  # not measured, or another kind of budget
            return None
        questions = self._questions(*keys)
        if not questions:
            return None
        one, two = (self._column(key, "kl", questions) for key in keys)
        f1 = None
        scores = [self._column(key, "f1", questions) for key in keys]
        if not np.isnan(scores).any():
            f1 = self._bootstrap(len(questions)).difference(*scores)
        return self._difference(keys[0], second, one, two, questions, f1)

    def _at_equal_cost(self, first: str, second: str, ratio: float) -> Difference | None:
        """Return the difference at equal cost; None if the second way has no points around."""
        key: Key = (first, ratio)
        points: list[Key] = [(STITCH_ONLY, 0.0)]
        points += [(second, other) for other in self.ratios(second) if other > 0]
        asked = self._questions(key, *points)
        if not asked:
            return None
        costs, quality = (
            np.stack([self._column(point, what, asked) for point in points], axis=1)
            for what in ("flops", "kl")
        )
        interpolated = at_costs(costs, quality, self._column(key, "flops", asked))
        covered = ~np.isnan(interpolated)
        if covered.sum() < _COVERED * len(asked):
            return None
        questions = [question for question, here in zip(asked, covered, strict=True) if here]
        one = self._column(key, "kl", questions)
        return self._difference(key, second, one, interpolated[covered], questions, None)

    def _difference(
        self,
        key: Key,
        second: str,
        one: Values,
        two: Values,
        questions: Sequence[str],
        f1: Estimate | None,
    ) -> Difference:
        """Return the difference of two ways, from their KL question by question."""
        boot = self._bootstrap(len(questions))
        stitched = self._column((STITCH_ONLY, 0.0), "kl", questions)
        return Difference(
            first=key[0],
            second=second,
            ratio=key[1] if key in self._plain else None,
            gap=boot.gap_share_difference(one, two, stitched, np.zeros(len(questions))),
            kl_ratio=boot.typical_ratio(one, two),
            f1=f1,
            budget=self._budgets[key],
        )


@functools.lru_cache(maxsize=8)
def _bootstrap(count: int, seed: int) -> Bootstrap:
    return Bootstrap(count, seed=seed)


def _key(way: dict[str, Any]) -> Key:
    """Return name and amount of a result; every other kind of budget counts as another way."""
    if "budget" not in way:
        return way["way"], float(way["ratio"])
    number = way["budget"].partition("+")[0].rpartition("=")[2]
    return f"{way['way']} ({way['kind'].removeprefix('+')})", float(number)
