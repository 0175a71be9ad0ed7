"""Shades of scores, and runs of text that share one shade."""

from __future__ import annotations

import bisect
import dataclasses
import unicodedata

from ifkv.report.data import Report

# Scores span four orders of magnitude, without counting a few attention sinks. So a shade stands
# for the ratio to the mean of the documents' tokens, in steps of about two.
STEPS = (0.5, 1.0, 2.0, 5.0, 12.0)
LEVELS = len(STEPS) + 1


@dataclasses.dataclass(frozen=True)
class Run:
    """Run of neighbouring tokens that look the same.

    Attributes:
        text: Text of the tokens.
        level: Shade, from 0 (under half of the mean) to ``LEVELS - 1``.
        recomputed: True if they were recomputed.
        weight: Sum of their scores over the mean, each capped at the last of ``STEPS``. Lines of
            text are compared by it, without one sink deciding.
    """

    text: str
    level: int
    recomputed: bool
    weight: float


@dataclasses.dataclass(frozen=True)
class DocumentShare:
    """Share of a document in the context and its attention.

    Attributes:
        title: Name of the document.
        number: Index among the documents given, from 1.
        tokens: Number of tokens.
        recomputed: Number of recomputed tokens.
        mass: Share of the scores of all documents, between 0 and 1.
        slots: Slots of the document.
    """

    title: str
    number: int
    tokens: int
    recomputed: int
    mass: float
    slots: slice


def document_shares(report: Report) -> list[DocumentShare]:
    """Return each document's title, size and share of the attention, in the cache's order."""
    masses = [sum(report.scores[part]) for part in report.document_slices]
    total = sum(masses) or 1.0
    shares = []
    for index, (part, mass) in enumerate(zip(report.document_slices, masses, strict=True)):
        shares.append(
            DocumentShare(
                title=_title(report, index),
                number=(report.order[index] if report.order else index) + 1,
                tokens=part.stop - part.start,
                recomputed=sum(slot in report.recomputed for slot in range(part.start, part.stop)),
                mass=mass / total,
                slots=part,
            )
        )
    return shares


def richest(shares: list[DocumentShare], count: int) -> list[int]:
    """Return the indices of the ``count`` documents with the most attention, in cache order."""
    by_mass = sorted(range(len(shares)), key=lambda index: (-shares[index].mass, index))
    return sorted(by_mass[:count])


def runs(report: Report, slots: slice) -> list[Run]:
    """Cut slots into runs that look the same; their texts join to the slots' text.

    A token without text, whose character is completed by a later token, lends its score and mark to
    that token, so that no recomputed token stays unseen.

    Args:
        report: The report that is shown.
        slots: Slots to cut, such as one document's.
    """
    documents = [score for part in report.document_slices for score in report.scores[part]]
    mean = sum(documents) / len(documents) if documents else 0.0
    found: list[Run] = []
    score, weight, marked = 0.0, 0.0, False
    for slot in range(slots.start, slots.stop):
        ratio = report.scores[slot] / mean if mean > 0 else 0.0
        score = max(score, ratio)
        weight += min(ratio, STEPS[-1])
        marked = marked or slot in report.recomputed
        text = report.token_texts[slot]
        if not text:
            continue
        level = bisect.bisect_right(STEPS, score)
        if not found or (found[-1].level, found[-1].recomputed) != (level, marked):
            # A word's shade starts at the word, not at the space that its token begins with.
            space = text[: len(text) - len(text.lstrip())]
            if space and space != text:
                _append(found, Run(space, 0, False, 0.0))
                text = text[len(space) :]
        _append(found, Run(text, level, marked, weight))
        score, weight, marked = 0.0, 0.0, False
    return found


def _append(found: list[Run], run: Run) -> None:
    """Add a run, or lengthen the last one if it looks the same."""
    last = found[-1] if found else None
    if last and (last.level, last.recomputed) == (run.level, run.recomputed):
        found[-1] = Run(last.text + run.text, run.level, run.recomputed, last.weight + run.weight)
    else:
        found.append(run)


def visible(text: str) -> str:
    """Return text with control characters, except line breaks, replaced by a visible mark.

    Documents come from anywhere: an escape sequence in one must not reach the terminal.
    """
    return "".join(
        "\ufffd" if char != "\n" and unicodedata.category(char) in ("Cc", "Cs") else char
        for char in text.replace("\r\n", "\n").replace("\t", "    ")
    )


def _title(report: Report, index: int) -> str:
    if report.titles and report.titles[index]:
        return visible(report.titles[index]).replace("\n", " ")
    part = report.document_slices[index]
    opening = visible("".join(report.token_texts[part.start : min(part.stop, part.start + 40)]))
    words = " ".join(opening.split())
    return words if len(words) <= 40 else words[:39].rsplit(" ", 1)[0] + "…"
