"""Table of the ways of answering a question, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ifkv.report.data import AnswerRow
from ifkv.report.shading import visible


def comparison_table(rows: Sequence[AnswerRow], *, title: str | None = None) -> Table:
    """Return a table of the ways compared.

    Args:
        rows: The ways, one per row.
        title: Text above the table, such as the question.

    Returns:
        A table for a rich console.
    """
    table = Table(
        title=None if title is None else Text(visible(title)),
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
    )
    table.add_column("way", min_width=15, overflow="fold")
    for name in ("TTFT", "speed-up", "of S(r)", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("answer", ratio=1, min_width=16)
    for row in rows:
        table.add_row(
            Text(visible(row.way)),
            seconds(row.ttft_seconds),
            times(row.speedup),
            percent(row.share_of_bound),
            nats(row.kl),
            Text(one_line(row.answer)) + Text(f" [{row.cut}]" if row.cut else "", "yellow"),
        )
    return table


def seconds(value: float) -> str:
    """Return a duration as text, in milliseconds below a second."""
    return f"{value * 1e3:.0f} ms" if value < 0.9995 else f"{value:.2f} s"


def times(value: float | None) -> str:
    """Return a factor as text, to three digits."""
    if value is None:
        return "–"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}×"


def percent(value: float | None) -> str:
    """Return a share as text."""
    return "–" if value is None else f"{value:.0%}"


def nats(value: float | None) -> str:
    """Return a divergence as text; rounding error only is shown as its power of ten."""
    if value is None:
        return "–"
    return f"{value:.4f}" if value == 0 or value >= 5e-5 else f"{value:.0e}"


def one_line(text: str) -> str:
    """Return text with line breaks shown as a sign, so that a row stays a row."""
    return visible(text.strip()).replace("\n", " ⏎ ")
