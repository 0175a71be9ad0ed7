"""Page for the browser: one self-contained HTML file without scripts."""

from __future__ import annotations

import dataclasses
import html
import os
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ifkv.errors import InvalidInputError
from ifkv.report.data import AnswerRow, Report
from ifkv.report.sentences import Sentence, strongest
from ifkv.report.shading import STEPS, Run, document_shares, richest, runs, visible
from ifkv.report.table import nats, one_line, percent, seconds, times
from ifkv.utils.files import write_whole

if TYPE_CHECKING:
    from jinja2 import Template

# Number of documents whose text is unfolded when the page opens.
OPEN_DOCUMENTS = 3
# Number of sentences that are listed above the text, with links into it.
STRONGEST_SENTENCES = 6


def render_html(
    reports: Sequence[Report], *, title: str = "Where questions look", note: str = ""
) -> str:
    """Render questions, the ways of answering them, and the shaded documents.

    Args:
        reports: One for each question; at least one.
        title: Title of the page.
        note: A sentence below the title, such as the model and how it was asked.

    Returns:
        A complete HTML document.

    Raises:
        InvalidInputError: ``reports`` is empty.
    """
    if not reports:
        raise InvalidInputError("there is no report to render; give at least one question's.")
    return _template().render(
        title=visible(title),
        note=visible(note),
        steps=STEPS,
        sections=[_section(report, opened=index == 0) for index, report in enumerate(reports)],
    )


def write_html(
    path: str | os.PathLike[str],
    reports: Sequence[Report],
    *,
    title: str = "Where questions look",
    note: str = "",
) -> Path:
    """Render to a file; an existing one is replaced only when the new one is complete.

    Args:
        path: Path of the file; its folder is made if need be.
        reports: As for `render_html`.
        title: As for `render_html`.
        note: As for `render_html`.

    Returns:
        The file's absolute path.
    """
    return write_page(path, render_html(reports, title=title, note=note))


def write_page(path: str | os.PathLike[str], page: str) -> Path:
    """Write a page to a file as `write_html` does; return the file's absolute path."""
    target = Path(path).absolute()
    write_whole(target, page)
    return target


def _section(report: Report, *, opened: bool) -> dict[str, Any]:
    """Return the template's variables for one question."""
    shares = document_shares(report)
    unfolded = richest(shares, OPEN_DOCUMENTS) if opened else []
    largest = max((share.mass for share in shares), default=0.0) or 1.0
    slowest = max((row.ttft_seconds for row in report.rows), default=0.0) or 1.0
    # Without scores, all sentences are equally strong.
    marked = strongest(report, STRONGEST_SENTENCES) if report.scored else []
    documents = [
        {
            "share": share,
            "open": index in unfolded,
            "percent": f"{share.mass:.1%}",
            "width": f"{share.mass / largest:.1%}",
            "parts": _parts(report, index, marked),
        }
        for index, share in enumerate(shares)
    ]
    return {
        "question": visible(report.question),
        "answer": visible(report.answer.strip()),
        "context": len(report.token_texts),
        "prefix": report.prefix_length,
        "recomputed": len(report.recomputed),
        "recomputed_share": percent(len(report.recomputed) / max(1, len(report.token_texts))),
        "scored": report.scored,
        "measure": report.measure,
        "documents": documents,
        "reordered": list(report.order) != sorted(report.order),
        "asked": sorted(enumerate(shares), key=lambda pair: pair[1].number),
        "sentences": [
            {"text": one.text, "density": times(one.density), "title": shares[one.document].title}
            for one in marked
        ],
        "rows": [_row(row, slowest) for row in report.rows],
        "steps": _steps(report),
        "ttft": None if report.ttft_seconds is None else seconds(report.ttft_seconds),
        "bound": times(report.bound),
    }


def _parts(report: Report, document: int, marked: list[Sentence]) -> list[dict[str, Any]]:
    """Return a document's runs, cut where one of the strongest sentences begins."""
    slots = report.document_slices[document]
    begins = {one.slots.start: rank for rank, one in enumerate(marked, 1)}
    cuts = sorted({slots.start, *(at for at in begins if slots.start <= at < slots.stop)})
    cut = [runs(report, slice(*pair)) for pair in pairwise([*cuts, slots.stop])]
    cut[-1] = _without_end(cut[-1])
    return [
        {"anchor": begins.get(start), "runs": part} for start, part in zip(cuts, cut, strict=True)
    ]


def _steps(report: Report) -> list[dict[str, str]]:
    """Return each step's time, and its bar's length relative to the longest step."""
    whole = report.ttft_seconds or 0.0
    return [
        {
            "name": name,
            "seconds": seconds(value),
            "share": percent(value / whole) if whole and name != "decode" else "–",
            "width": f"{min(1.0, value / whole):.1%}" if whole and name != "decode" else "0%",
        }
        for name, value in report.timings.items()
    ]


def _without_end(found: list[Run]) -> list[Run]:
    """Return the runs without the blank lines at the document's end."""
    while found and not found[-1].text.strip():
        found = found[:-1]
    if found:
        found = [*found[:-1], dataclasses.replace(found[-1], text=found[-1].text.rstrip())]
    return found


def _row(row: AnswerRow, slowest: float) -> dict[str, str]:
    """Return one way of answering as texts for the template."""
    return {
        "way": visible(row.way),
        "ttft": seconds(row.ttft_seconds),
        "width": f"{row.ttft_seconds / slowest:.1%}",
        "speedup": times(row.speedup),
        "bound": times(row.bound),
        "share": percent(row.share_of_bound),
        "kl": nats(row.kl),
        "answer": one_line(row.answer) + (f" [{row.cut}]" if row.cut else ""),
    }


@cache
def _template() -> Template:
    """Return the page's template, which escapes every text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ifkv.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["visible"] = visible
    return environment.get_template("page.html")


def framed(page: str, *, height: str = "36rem") -> str:
    """Put a page into a frame that runs nothing and whose style stays inside."""
    return (
        f'<iframe title="Where the question looks" sandbox srcdoc="{html.escape(page)}" '
        f'style="width:100%;height:{height};border:1px solid #8888;border-radius:.5rem"></iframe>'
    )
