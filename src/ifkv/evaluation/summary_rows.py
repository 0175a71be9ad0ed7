"""Rows of a summary: one way of answering, or the difference of two."""

from __future__ import annotations

import dataclasses
from typing import Any

from ifkv.evaluation.bootstrap import Estimate

FULL = "full prefill"


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """Measurements of one way over all questions that were asked in it.

    Attributes:
        way: Name: the selector's string, "full prefill" or "stitch only".
        ratio: Recompute ratio; None for a budget by number or mass.
        count: Number of questions.
        rows: Recomputed slots as a share of the context; mean over questions.
        flops: Operations to the first token, as a share of full prefill's, pooled.
        selecting: Part of these operations that selection takes.
        gap: Share of the KL gap between stitching alone and full prefill that is recovered, pooled.
        nll_gap: The same for the likelihood of the right answer.
        kl: KL(full || this), mean over the answer's tokens and over questions, nats.
        top1: Share of tokens with the same most likely next token.
        nll: -log p of the right answer's tokens, nats.
        f1: Token F1 of the answers; None if not every question has one.
        em: Exact match; None likewise.
        budget: Budget as tables show it; a plain ratio is its number.
    """

    way: str
    ratio: float | None
    count: int
    rows: float
    flops: float
    selecting: float
    gap: Estimate
    nll_gap: Estimate
    kl: Estimate
    top1: Estimate
    nll: Estimate
    f1: Estimate | None
    em: Estimate | None
    budget: str


Row = SummaryRow  # another name of it


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference between two ways over the same questions: which is nearer to full prefill.

    Attributes:
        first: The way that is compared.
        second: The way that it is compared with.
        ratio: The first one's ratio; None for a budget by number or mass.
        gap: Difference of the shares of the gap, first minus second.
        kl_ratio: The first one's KL over the second one's on a typical question: the geometric mean
            of the questions' ratios.
        f1: Difference of F1, at equal ratio; None unless both have answers.
        budget: The first one's budget, as tables show it.
    """

    first: str
    second: str
    ratio: float | None
    gap: Estimate
    kl_ratio: Estimate
    f1: Estimate | None
    budget: str


def as_dict(row: SummaryRow | Difference) -> dict[str, Any]:
    """Return a row's numbers by name, intervals as ``name_low`` and ``name_high``."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if "Estimate" in str(field.type):
            for part in ("value", "low", "high"):
                name = field.name if part == "value" else f"{field.name}_{part}"
                flat[name] = None if value is None else getattr(value, part)
        else:
            flat[field.name] = value
    return flat
