"""Sentences of the documents with the most attention of the question, found token by token."""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise

from ifkv.report.data import Report
from ifkv.report.shading import STEPS, visible

# A sentence ends after a full stop, a question mark or an exclamation mark (also those of Chinese
# and Japanese), or at a line break. Headings and list items end with their lines.
_END = re.compile(r"[.!?][\"')\]»”’]*(?=\s)|[。！？]|\n+")
# Shorter ones are numbers of list items, abbreviations and the like.
_LEAST_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Sentence:
    """Sentence of a document and its attention.

    Attributes:
        document: Index of its document in the cache's order.
        slots: Slots of the sentence.
        text: Text of the sentence, on one line.
        density: Mean of its tokens' scores over the mean of all documents' tokens, each capped at
            the last of ``STEPS``, so that one attention sink does not decide.
    """

    document: int
    slots: slice
    text: str
    density: float


def sentences(report: Report, document: int) -> list[Sentence]:
    """Cut a document into sentences that together cover its slots."""
    part = report.document_slices[document]
    texts = report.token_texts[part]
    ends = iter([match.end() for match in _END.finditer("".join(texts))])
    mean = _mean(report)
    # A sentence begins after the token that holds the last character of the one before.
    cuts, offset, end = [part.start], 0, next(ends, None)
    for slot, text in zip(range(part.start, part.stop), texts, strict=True):
        offset += len(text)
        if end is not None and offset >= end:
            cuts.append(slot + 1)
            while end is not None and end <= offset:
                end = next(ends, None)
    found: list[Sentence] = []
    for start, stop in pairwise([*cuts, part.stop]):
        words = " ".join(visible("".join(report.token_texts[start:stop])).split())
        if not words and found:  # blank lines belong to the sentence before them
            start = found.pop().slots.start
            words = " ".join(visible("".join(report.token_texts[start:stop])).split())
        if start < stop:
            capped = [min(score / mean, STEPS[-1]) for score in report.scores[start:stop]]
            density = sum(capped) / len(capped)
            found.append(Sentence(document, slice(start, stop), words, density))
    return found


def strongest(report: Report, count: int) -> list[Sentence]:
    """Return the ``count`` sentences with the highest density, highest first."""
    everything = [
        sentence
        for document in range(len(report.document_slices))
        for sentence in sentences(report, document)
        if sentence.slots.stop - sentence.slots.start >= _LEAST_TOKENS and sentence.text
    ]
    return sorted(everything, key=lambda one: (-one.density, one.slots.start))[:count]


def _mean(report: Report) -> float:
    documents = [score for part in report.document_slices for score in report.scores[part]]
    total = sum(documents)
    return total / len(documents) if total > 0 else 1.0
