"""Ways of answering, and their measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ifkv.cache.layout import GEOMETRIES
from ifkv.errors import InvalidInputError
from ifkv.evaluation.budgets import kind, label
from ifkv.evaluation.encodings import Encoding
from ifkv.selectors import Budget, Selector, resolve
from ifkv.steps.select import budget

STITCH_ONLY = "stitch only"


@dataclasses.dataclass(frozen=True)
class Way:
    """Way of answering from stitched documents.

    Attributes:
        selector: Selector of the slots to recompute; None recomputes none.
        ratio: The recompute ratio.
        reorder: True if documents are first ordered by [ifkv.reorder][].
        other: A budget that is not a plain ratio; it replaces the ratio.
        encoding: The surrogate context of the documents; None if they are encoded alone.
    """

    selector: Selector | None = None
    ratio: float = 0.0
    reorder: bool = False
    other: Budget | None = None
    encoding: Encoding | None = None

    @property
    def budget(self) -> Budget:
        """Return the budget of slots that it may recompute."""
        return Budget.of(self.ratio) if self.other is None else self.other

    @property
    def name(self) -> str:
        """Return the selector as a string, and what else was done to the documents."""
        chosen = STITCH_ONLY if self.selector is None else str(self.selector)
        moved = " +reorder" if self.reorder else ""
        behind = "" if self.encoding is None else f" behind {self.encoding}"
        return chosen + moved + behind

    @property
    def key(self) -> str:
        """Return the string that identifies it among all ways."""
        return f"{self.name} @{label(self.budget)}"


@dataclasses.dataclass(frozen=True)
class Reference:
    """Full prefill of a question.

    Attributes:
        context: Tokens of prefix and documents, T.
        prompt: Tokens of the prompt, Q.
        documents: Number of documents.
        tokens: Length of the answer.
        flops: Operations of the prefill.
        nll: Mean -log p of the right answer's tokens, in nats.
        answer: The greedy answer.
        f1: Token F1 of the answer against the best right one.
        em: Exact match of the answer, likewise.
    """

    context: int
    prompt: int
    documents: int
    tokens: int
    flops: float
    nll: float
    answer: str
    f1: float
    em: float


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of one question answered in one way.

    Attributes:
        way: The way.
        rows: Number of recomputed slots.
        flops: Operations to the first token: selection, recompute, prompt.
        selecting_flops: Part of these operations that selection takes, including reordering.
        selecting_bytes: Bytes that selection reads and writes.
        kl: Mean over full prefill's answer of KL(full || this), in nats.
        top1: Share of these tokens for which both find the same token most likely.
        nll: Mean -log p of the right answer's tokens, in nats.
        answer: The greedy answer; None if none was decoded.
        f1: Token F1 of the answer against the best right one.
        em: Exact match of the answer, likewise.
    """

    way: Way
    rows: int
    flops: float
    selecting_flops: float
    selecting_bytes: float
    kl: float
    top1: float
    nll: float
    answer: str | None
    f1: float | None
    em: float | None

    def record(self) -> dict[str, Any]:
        """Return what the log keeps of it, as plain JSON."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "way"
        }
        way = self.way
        named = {"way": way.name, "ratio": way.budget.ratio, "reorder": way.reorder}
        if way.other is not None:
            named |= {"budget": label(way.other), "kind": kind(way.other)}
        return named | values


def matrix(
    selectors: Sequence[str | Selector],
    ratios: Sequence[float],
    *,
    geometries: Sequence[str] = (),
    reorder: bool = False,
    budgets: Sequence[Budget] = (),
    encodings: Sequence[Encoding | None] = (None,),
) -> list[Way]:
    """Return every way of a matrix: stitching alone first, then selector by selector.

    Stitching alone of documents that were encoded alone is always one of them, because gaps are
    measured from it.

    Args:
        selectors: Selectors, or strings that name them with their options.
        ratios: Recompute ratios.
        geometries: Geometries to try with each selector that has an option ``geometry``; if empty,
            the selector's own.
        reorder: True to try every selector with documents reordered too.
        budgets: Budgets besides the ratios: numbers, shares of the scores, smoothed ones.
        encodings: Surrogate contexts of the documents; None encodes them alone.

    Returns:
        The ways, each once.

    Raises:
        InvalidInputError: A selector, option or geometry is unknown, or a ratio is outside [0, 1];
            or there is no selector or ratio.

    Examples:
        >>> [way.key for way in matrix(["random"], [0.05, 0.15])]
        ['stitch only @0', 'random @0.05', 'random @0.15']
    """
    if not selectors or not (ratios or budgets):
        raise InvalidInputError(
            f"there are {len(selectors)} selectors and {len(ratios)} ratios; give one of each."
        )
    # A plain ratio is recognised in whatever form it is given.
    ratios = [*ratios, *(one.ratio for one in budgets if one.ratio is not None and not kind(one))]
    others = list(dict.fromkeys(one for one in budgets if kind(one)))
    for ratio in ratios:
        budget(1, ratio)
    for geometry in geometries:
        if geometry not in GEOMETRIES:
            raise InvalidInputError(
                f"geometry {geometry!r} is unknown; choose from {', '.join(GEOMETRIES)}."
            )
    chosen: dict[str, Selector] = {}
    for given in selectors:
        selector = resolve(given) if isinstance(given, str) else given
        options: Any = selector
        variants = [selector]
        if geometries and hasattr(selector, "geometry"):
            variants = [dataclasses.replace(options, geometry=name) for name in geometries]
        chosen.update((str(variant), variant) for variant in variants)
    ways = [Way()]
    for encoding in encodings:
        if encoding is not None:
            ways.append(Way(encoding=encoding))
        for selector in chosen.values():
            for moved in (False, True) if reorder else (False,):
                ways += [
                    Way(selector, float(ratio), moved, encoding=encoding)
                    for ratio in sorted(set(ratios))
                ]
                ways += [Way(selector, 0.0, moved, one, encoding) for one in others]
    return ways
