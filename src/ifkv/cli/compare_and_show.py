"""Steps that ``ifkv demo`` and ``ifkv ask`` share: prefill, compare answers, show them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.markup import escape

from ifkv.cli.output_paths import say_written
from ifkv.cli.wording import count
from ifkv.evaluation.compare import Way, compare, overruled
from ifkv.generation.finish_reason import cut_sign
from ifkv.report import AnswerRow, Heatmap, Report, comparison_table, write_html
from ifkv.report.shading import visible

if TYPE_CHECKING:
    from rich.console import Console

    from ifkv.documents.source import Source
    from ifkv.session.session import Session

# Number of documents that are named in a line.
_NAMED = 8


def add_documents(
    console: Console,
    session: Session,
    texts: Sequence[str],
    sources: Sequence[Source | str],
    *,
    split: int | None = None,
    say: bool = True,
) -> list[str]:
    """Prefill documents and print how long that took.

    Args:
        console: Console to print on.
        session: A session over the model.
        texts: The texts.
        sources: Source of each text.
        split: As in [ifkv.Session.add][].
        say: True to print.

    Returns:
        Keys of the documents, without repetitions.
    """
    started, before = time.perf_counter(), session.prefilled
    added = session.add(texts, split=split, sources=sources, progress=True)
    keys = list(dict.fromkeys(added))
    if say:
        seconds, made = time.perf_counter() - started, session.prefilled - before
        present = len(keys) - made
        console.print(
            f"{count(len(keys), 'document')}, {len(session.context_ids(keys))} tokens with their "
            "prefix: "
            + (f"{made} prefilled once" if made else "")
            + (", " if made and present else "")
            + (f"{present} found in the store" if present else "")
            + f" in {seconds:.1f} s. The times below begin with the question and leave that out."
        )
    return keys


def say_documents(console: Console, session: Session, keys: Sequence[str]) -> None:
    """Print the names of the documents that a question is asked over."""
    names = [
        str(sources[0]) if sources else key[:16] for key, sources in session.sources(keys).items()
    ]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    console.print(
        visible(
            f"{count(len(keys), 'document')}, {len(session.context_ids(keys))} tokens with their "
            f"prefix: {', '.join(names[:_NAMED])}{more}"
        ),
        markup=False,
        highlight=False,
    )


_MOVED = (
    "KL is left out where documents were reordered: full prefill read them in the order given, and "
    "to another order its distance cannot be compared."
)


def answer_questions(
    console: Console,
    session: Session,
    *,
    documents: Sequence[str],
    questions: Sequence[str],
    expected: Sequence[str] | None,
    ratio: float | Literal["auto"],
    reorder: bool,
    selector: str | None = None,
    max_new_tokens: int | None,
    html: Path | None,
) -> None:
    """Answer questions by full prefill, by stitching alone and by ifkv, and show the answers.

    Args:
        console: Console to print on.
        session: A session over the model.
        documents: Keys of the documents.
        questions: The questions.
        expected: Words of a right answer, one text per question; None if not known.
        ratio: Recompute ratio, or ``"auto"`` to have it planned.
        reorder: True to reorder documents.
        selector: Selector of the tokens to recompute; the session's if None.
        max_new_tokens: As in [ifkv.Session.ask][].
        html: Path of the page to write; None for no page.
    """
    # The first way to be timed would pay for reading what is on a disk only; let it be in memory.
    for key in documents:
        session.store.get(key)
    # The first forward of each kind allocates threads and buffers, so it is run before the clock.
    compare(session, questions[0], documents=documents[:1], max_new_tokens=1)

    settings = overruled(session.model)
    if settings:
        console.print(
            f"The model's generation config asks for {settings}; a comparison decodes greedily."
        )
    reports: list[Report] = []
    ratios = (0.0, ratio) if ratio != 0 else (0.0,)
    for index, question in enumerate(questions):
        with console.status(f"question {index + 1} of {len(questions)}: {escape(question)}"):
            ways = compare(
                session,
                question,
                documents=documents,
                ratios=ratios,
                reorder=reorder,
                selector=selector,
                max_new_tokens=max_new_tokens,
            )
        reports.append(_report(session, question, ways))
        hint = f"  (expected: {expected[index]})" if expected else ""
        console.print()
        console.print(comparison_table(reports[-1].rows, title=question + hint))
    if len(reports) > 1:
        console.print(_summary(reports))
    moved = any(row.kl is None for report in reports for row in report.rows)
    if moved:
        console.print(f"\n{_MOVED}")
    console.print()
    console.print(Heatmap(reports[0], documents=3, lines=4))
    if html is not None:
        tokens = len(session.context_ids(documents))
        note = f"{type(session.model).__name__}, {tokens} tokens of context, r = {ratio}"
        if moved:
            note = f"{note}. {_MOVED}"
        write_html(html, reports, note=note)
        console.print()
        say_written(console, html)


def _report(session: Session, question: str, ways: Sequence[Way]) -> Report:
    """Build the report of one question; its picture is that of the last way, ifkv's."""
    rows = [
        AnswerRow(
            way=way.name,
            ttft_seconds=way.ttft_seconds,
            answer=way.text,
            cut=cut_sign(way.finish_reason, way.tokens),
            speedup=way.speedup,
            bound=way.bound,
            kl=way.kl,
        )
        for way in ways
    ]
    answer = ways[-1].answer
    assert answer is not None
    return Report.from_answer(session.tokenizer, question, answer, rows=rows)


def _summary(reports: Sequence[Report]) -> str:
    """Return a line with the median speed-up and divergence of each way over all questions."""
    parts = []
    for rows in zip(*(report.rows[1:] for report in reports), strict=True):
        speedup = statistics.median(row.speedup or 0.0 for row in rows)
        measured = [row.kl for row in rows if row.kl is not None]
        kl = f", KL {statistics.median(measured):.3f}" if len(measured) == len(rows) else ""
        parts.append(f"{rows[0].way}: {speedup:.2f}× faster{kl}")
    return f"\nMedians over {len(reports)} questions. " + "; ".join(parts) + "."


def stream_answer(
    console: Console,
    session: Session,
    question: str,
    *,
    documents: Sequence[str],
    ratio: float | Literal["auto"],
    reorder: bool,
    selector: str | None = None,
    max_new_tokens: int | None,
    html: Path | None,
) -> None:
    """Stream one answer, print its time to first token, and write its page if asked."""
    answer = session.ask(
        question,
        documents=documents,
        ratio=ratio,
        reorder=reorder,
        selector=selector,
        max_new_tokens=max_new_tokens,
        stream=lambda piece: console.print(piece, end="", markup=False, highlight=False),
    )
    cut = cut_sign(answer.finish_reason, len(answer.token_ids))
    if cut:
        console.print(f" [yellow]\\[{cut}][/]", end="")
    console.print(
        f"\n[dim]first token after {answer.ttft_seconds:.2f} s, {len(answer.slots)} of "
        f"{len(answer.context_ids)} tokens recomputed[/]"
    )
    if html is not None:
        answer.to_html(html)
        say_written(console, html)
