"""Summary files of a folder: Markdown, a page, CSV, and a CSV of all pairs of ways."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ifkv.errors import InvalidInputError
from ifkv.evaluation.page import render
from ifkv.evaluation.results_log import Ledger
from ifkv.evaluation.summary import Summary
from ifkv.evaluation.tables import comma_separated, csv_of, markdown, sections
from ifkv.utils.files import write_whole

SUMMARY, TABLE, PAIRS = "summary.md", "summary.csv", "differences.csv"
PAGE = "summary.html"


def publish(
    ledger: Ledger, *, seed: int = 0, only: Sequence[str] | None = None
) -> tuple[Summary, list[Path]]:
    """Summarise the results of a folder and write the summary there.

    Args:
        ledger: The folder.
        seed: Seed of the bootstrap's resamples.
        only: Ids of the questions to use; all if None.

    Returns:
        The summary, and the files that were written.

    Raises:
        InvalidInputError: The folder holds no finished question.
    """
    summary = Summary(ledger, seed=seed, only=only)
    try:
        solved = Summary(ledger, seed=seed, only=only, solved=True)
    except InvalidInputError:
        solved = None  # full prefill solves none of them
    at_ratio = list(summary.differences())
    at_cost = list(summary.differences(equal_cost=True))
    parts = sections(summary, solved, at_ratio, at_cost)
    settings = ledger.settings
    title = f"{settings['data']}, {settings['architecture']}, {settings['dtype']}"
    text = [f"# {title}"]
    for heading, note, heads, cells in parts:
        if cells:
            text += [f"## {heading}", note, markdown(heads, cells)]
    text.append("Settings: " + ", ".join(f"{key} {value!r}" for key, value in settings.items()))

    lines = csv_of(summary.rows, questions="all")
    if solved is not None:
        lines += csv_of(solved.rows, questions="solved")
    pairs = csv_of(at_ratio, at="equal ratio") + csv_of(at_cost, at="equal cost")
    contents = {
        SUMMARY: "\n\n".join(text) + "\n",
        PAGE: render(title, summary.rows, parts, settings),
        TABLE: comma_separated(lines),
        PAIRS: comma_separated(pairs),
    }
    written = []
    for name, content in contents.items():
        path = ledger.folder / name
        write_whole(path, content)
        written.append(path)
    return summary, written
