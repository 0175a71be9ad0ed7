"""Summary as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from ifkv.evaluation.bootstrap import Estimate
from ifkv.evaluation.summary import Summary
from ifkv.evaluation.summary_rows import FULL, Difference, SummaryRow, as_dict
from ifkv.evaluation.ways import STITCH_ONLY
from ifkv.selectors import names, selector_class

_NOTE = (
    "Brackets are 95 % bootstrap intervals over questions. *gap* is the share of the KL divergence "
    "between stitching alone and full prefill that a way recovers, pooled over questions; *cost* "
    "is operations to the first token as a share of full prefill's."
)


_UNEVEN = (
    " Not every way was asked every question: *n* says how many. Rows over different questions "
    "cannot be compared; run the same command again to fill them up, or read the differences."
)


def estimate(
    value: Estimate | None, digits: int = 3, percent: bool = False, brief: bool = False
) -> str:
    """Return an estimate as text: with its interval unless brief, a dash if there is none.

    >>> estimate(Estimate(0.5, 0.25, 0.75, 9), percent=True)
    '50 % [25, 75]'
    """
    if value is None or not math.isfinite(value.value):
        return "–"
    if percent:
        # Adding 0 turns -0 into 0.
        middle, low, high = (round(100 * x) + 0 for x in (value.value, value.low, value.high))
        return f"{middle} % [{low}, {high}]"
    if brief:
        return f"{value.value:.{digits}f}"
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def factor(value: Estimate) -> str:
    """Return a factor and its interval as text.

    >>> factor(Estimate(0.5, 0.25, 0.75, 9))
    '0.50× [0.25, 0.75]'
    """
    return f"{value.value:.2f}× [{value.low:.2f}, {value.high:.2f}]"


def quality_table(
    rows: Sequence[SummaryRow], *, brief: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of the quality table, with counts of questions if they differ.

    If brief, only the gap has its interval.
    """
    heads = ["way", "r", "cost", "gap", "KL", "top-1", "NLL", "F1", "EM"]
    uneven = len({row.count for row in rows}) > 1
    answered = any(row.f1 is not None for row in rows if row.way != FULL)
    if uneven:
        heads.insert(2, "n")
    cells = []
    for row in rows:
        plain = row.way in (FULL, STITCH_ONLY)
        cells.append(
            [
                row.way,
                "" if plain else row.budget,
                f"{row.flops:.3f}",
                "" if plain else estimate(row.gap, percent=True),
                estimate(row.kl, brief=brief),
                f"{row.top1.value:.3f}",
                estimate(row.nll, 2, brief=brief),
                estimate(row.f1, brief=brief),
                "–" if row.em is None else f"{row.em.value:.3f}",
            ]
        )
        if uneven:
            cells[-1].insert(2, str(row.count))
    if not answered:  # only full prefill has an answer, and there is nothing to compare it with
        heads, cells = heads[:-2], [line[:-2] for line in cells]
    return heads, cells


def difference_table(found: Iterable[Difference]) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of the table of paired differences."""
    heads = ["way", "against", "r", "more of the gap", "clear", "KL, typically", "F1"]
    cells = [
        [
            one.first,
            one.second,
            one.budget,
            estimate(one.gap, percent=True),
            ("ahead" if one.gap.value > 0 else "behind") if one.gap.excludes_zero else "no",
            factor(one.kl_ratio),
            estimate(one.f1),
        ]
        for one in found
    ]
    return heads, cells


def leaders(summary: Summary, found: Iterable[Difference]) -> list[Difference]:
    """Return the differences of the way that recovers most at each ratio."""
    chosen = []
    best: dict[float, str | None] = {}
    for one in found:
        if one.ratio is None:
            continue
        if one.ratio not in best:
            best[one.ratio] = summary.best(one.ratio, evaluation_only())
        if best[one.ratio] == one.first:
            chosen.append(one)
    return sorted(chosen, key=lambda one: one.ratio or 0.0)


def evaluation_only() -> list[str]:
    """Return the names of selectors that know what a request cannot."""
    return [name for name in names() if selector_class(name).evaluation_only]


def markdown(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def sections(
    summary: Summary,
    solved: Summary | None,
    equal_ratio: Sequence[Difference],
    equal_cost: Sequence[Difference],
) -> list[tuple[str, str, list[str], list[list[str]]]]:
    """Return the sections of every form of the summary: title, explanation, headings, cells."""
    uneven = len({row.count for row in summary.rows}) > 1
    note = _NOTE + (_UNEVEN if uneven else "")
    parts = [(f"All {summary.count} questions", note, *quality_table(summary.rows))]
    if solved is not None:
        parts.append(
            (
                f"The {solved.count} questions that full prefill solves",
                "Those whose full-prefill answer has an F1 of 0.5 or more.",
                *quality_table(solved.rows),
            )
        )
    leading = (
        "The way that recovers most at each ratio against all others, question by question; who "
        "leads was found on the same questions. *clear* means that the interval excludes zero. "
        "*KL, typically* is the geometric mean of the questions' own ratios of KL: below 1× the "
        "first is nearer to full prefill, and a few questions with a large KL do not decide it."
    )
    parts.append(
        (
            "Differences at equal ratio",
            leading,
            *difference_table(leaders(summary, equal_ratio)),
        )
    )
    parts.append(
        (
            "Differences at equal cost",
            "The same, against what the other reaches with the leader's operations, on the line "
            "between measured points. A pair is missing where the other was not measured at such a "
            "cost.",
            *difference_table(leaders(summary, equal_cost)),
        )
    )
    return parts


def comma_separated(lines: Sequence[dict[str, Any]]) -> str:
    """Return CSV with a heading, in full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def csv_of(rows: Iterable[SummaryRow | Difference], **further: Any) -> list[dict[str, Any]]:
    """Return rows for `comma_separated`, with further columns in front."""
    return [{**further, **as_dict(row)} for row in rows]
