"""Summary as a page for the browser: one self-contained HTML file without scripts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ifkv.evaluation.bootstrap import Estimate
from ifkv.evaluation.chart import HEIGHT, WIDTH, Chart, Line, Point
from ifkv.evaluation.summary_rows import FULL, SummaryRow
from ifkv.evaluation.tables import estimate, evaluation_only
from ifkv.evaluation.ways import STITCH_ONLY

if TYPE_CHECKING:
    from jinja2 import Template

_PLOTS = (
    ("gap", "Share of the KL gap recovered", "0 is stitching alone, 100 % a full prefill", True),
    ("kl", "KL to full prefill", "nats a token; lower is better", False),
    ("f1", "Token F1 of the answers", "higher is better", False),
    ("em", "Exact match of the answers", "higher is better", False),
)


def render(
    title: str,
    rows: Sequence[SummaryRow],
    sections: Sequence[tuple[str, str, list[str], list[list[str]]]],
    settings: dict[str, Any],
) -> str:
    """Return the page.

    Args:
        title: Title of the page.
        rows: Rows to plot: full prefill, stitching alone, then the other ways.
        sections: Title, explanation, headings and cells of each table.
        settings: Settings that all results share.

    Returns:
        A complete HTML document.
    """
    found = [chart for plot in _PLOTS if (chart := _chart(rows, *plot)) is not None]
    drawn = {line.number: line for chart in found for line in chart.lines}
    return _template().render(
        title=title,
        count=rows[0].count,
        uneven=len({row.count for row in rows}) > 1,
        charts=found,
        legend=[drawn[number] for number in sorted(drawn)],
        width=WIDTH,
        height=HEIGHT,
        sections=[(name, _plain(note), heads, cells) for name, note, heads, cells in sections],
        settings=settings,
    )


def _chart(
    rows: Sequence[SummaryRow], what: str, title: str, hint: str, percent: bool
) -> Chart | None:
    """Return the plot of one metric; None if full prefill or stitching alone lacks it."""
    levels = []
    for row in rows:
        value: Estimate | None = getattr(row, what)
        if row.way in (FULL, STITCH_ONLY) and value is not None and math.isfinite(value.value):
            levels.append((row.way, value.value))
    if len(levels) < 2:
        return None
    ways = list(dict.fromkeys(row.way for row in rows if row.way not in (FULL, STITCH_ONLY)))
    ceilings = evaluation_only()
    lines = []
    for number, way in enumerate(ways):
        ceiling = re.split("[: ]", way, maxsplit=1)[0] in ceilings
        points = [
            point
            for row in rows
            if row.way == way and (point := _point(row, what, percent, ceiling)) is not None
        ]
        lines.append(Line(number, way, points, ceiling))
    return Chart(title, hint, lines, levels, percent)


def _point(row: SummaryRow, what: str, percent: bool, ceiling: bool) -> Point | None:
    value: Estimate | None = getattr(row, what)
    if value is None or not math.isfinite(value.value):
        return None
    # The cost of a full prefill that names slots is not a cost of these slots.
    cost = row.flops - row.selecting if ceiling else row.flops
    text = estimate(value, percent=percent)
    title = f"{row.way}, r = {row.budget}: {text} at {cost:.3f} of full prefill's operations"
    title += f", {row.count} questions"
    return Point(cost, value.value, value.low, value.high, title)


def _plain(note: str) -> str:
    """Return a Markdown sentence without its emphasis."""
    return re.sub(r"\*([^*]+)\*", r"\1", note)


@cache
def _template() -> Template:
    """Return the page's template, which escapes every text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ifkv.evaluation"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["finite"] = math.isfinite
    return environment.get_template("summary.html")
