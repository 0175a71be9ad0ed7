"""Answers, and questions whose first token is decided."""

from __future__ import annotations

import dataclasses
import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ifkv.cost import NO_COST, Cost
from ifkv.errors import InvalidInputError
from ifkv.generation.finish_reason import FinishReason, cut_sign

if TYPE_CHECKING:
    from ifkv.cache.stitched import StitchedCache
    from ifkv.documents.source import Source
    from ifkv.planning.plan import Plan


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """An answer and how it came about.

    Attributes:
        text: The answer, special tokens left out.
        token_ids: The answer's tokens, long ``[new]``, on the CPU.
        ttft_seconds: Seconds from the question's arrival to the first token's logits.
        timings: Seconds of each step before that, and of ``decode`` after it. ``load`` is the
            time that the store took: finding documents, and waiting for rows that were read in the
            background while other steps ran (copies to a GPU count for the step that waits).
        scores: Selector's scores, by which the slots were chosen, ``[T]`` in the cache's order, on
            the CPU. None if nothing had to be scored (ratio 0 or 1).
        attention: The question's attention to each slot, ``[T]``, on the CPU. With the default
            selector: the slots' attention norms times the norms of their values, in the layers at
            55 to 70 % of the depth. None with a selector that does not use the question, and if
            nothing had to be scored.
        slots: Slots that were recomputed, ascending, on the CPU.
        order: For each document of the context, its index among those asked.
        context_ids: The context's tokens ``[T]``, on the CPU.
        document_slices: Slots of each document, in the cache's order.
        prompt_ids: The prompt's tokens, on the CPU.
        first_logits: Logits of the first answered token, float32 ``[vocabulary]``, on the CPU.
        speedup_bound: S(r) of this request: operations of a full prefill divided by those of this
            request, with the selected rows' actual positions.
        selector: Selector that chose the slots, as text for `ifkv.selectors.resolve`.
        question: The question that was asked.
        selection_cost: Cost of choosing the slots, reordering included.
        plan: Plan that decided ``ratio="auto"``; None for other ratios.
        tokenizer: The session's tokenizer, which turns the context's tokens into text again.
        finish_reason: Reason why the answer ended: ``"stop"`` (a stop token of the model),
            ``"stop_string"``, ``"length"`` (it was cut off at its greatest length), ``"time"``
            (cut off at ``max_time``), ``"criteria"`` (the caller's ``stopping_criteria``) or
            ``"closed"`` (its stream was closed).
        sources: Source of each document, in the order in which documents were given; None if it is
            not known. For a text that was added under several names, the first one.

    In a notebook, an answer is displayed as `to_html` draws it.
    """

    text: str
    token_ids: Tensor
    ttft_seconds: float
    timings: dict[str, float]
    scores: Tensor | None
    attention: Tensor | None
    slots: Tensor
    order: list[int]
    context_ids: Tensor
    document_slices: list[slice]
    prompt_ids: Tensor
    first_logits: Tensor
    speedup_bound: float
    selector: str
    question: str = ""
    selection_cost: Cost = NO_COST
    plan: Plan | None = None
    tokenizer: Any = None
    finish_reason: FinishReason = dataclasses.field(kw_only=True)
    sources: Sequence[Source | None] = ()

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        cut = cut_sign(self.finish_reason, len(self.token_ids))
        return (
            f"Answer({textwrap.shorten(self.text, 80, placeholder=' ...')!r}, "
            f"{cut + ', ' if cut else ''}"
            f"first token after {self.ttft_seconds:.2f} s, {len(self.slots)} of "
            f"{len(self.context_ids)} tokens recomputed, {len(self.document_slices)} documents)"
        )

    def to_html(
        self, path: str | os.PathLike[str] | None = None, *, titles: Sequence[str] = ()
    ) -> str:
        """Render a page that shows where the question looked and what was recomputed.

        One file without scripts, fonts or anything else to load: the documents' text shaded by
        attention norm, recomputed tokens underlined, each document's share of the attention, the
        order of the documents, and the time of each step beside the bound.

        Args:
            path: Also write the page to this file.
            titles: Names of the documents, in the order they were asked; their sources if not
                given, and their opening words where these are not known.

        Returns:
            The page.

        Raises:
            InvalidInputError: There is no tokenizer, or not one title for each document.
        """
        from ifkv.report.data import Report
        from ifkv.report.html import render_html, write_page

        if self.tokenizer is None:
            raise InvalidInputError(
                "this answer has no tokenizer, so its tokens cannot be shown as text; answers of "
                "Session.ask have one. Set it: dataclasses.replace(answer, tokenizer=tokenizer)."
            )
        if titles and len(titles) != len(self.order):
            raise InvalidInputError(
                f"titles has {len(titles)} entries for {len(self.order)} documents; give one for "
                "each, in the order they were asked."
            )
        report = Report.from_answer(self.tokenizer, self.question, self, titles=titles)
        page = render_html([report], title="Where the question looks")
        if path is not None:
            write_page(path, page)
        return page

    def _repr_html_(self) -> str | None:
        """Return the page in a frame, whose style stays inside; for notebooks."""
        if self.tokenizer is None:
            return None
        from ifkv.report.html import framed

        return framed(self.to_html())


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A question whose first token is decided: what `Session.prepare` returns.

    Attributes:
        cache: The stitched, repaired cache, with the prompt's rows behind the context.
        prompt_ids: The prompt's tokens.
        logits: Logits of the first answered token, ``[vocabulary]``.
        scores: As in `Answer`, on the model's device.
        attention: As in `Answer`, on the model's device.
        slots: As in `Answer`, on the model's device.
        timings: Seconds of each step.
        ttft_seconds: As in `Answer`.
        speedup_bound: As in `Answer`.
        question: As in `Answer`.
        selector: As in `Answer`.
        selection_cost: As in `Answer`.
        plan: As in `Answer`.
        sources: As in `Answer`.
    """

    cache: StitchedCache
    prompt_ids: list[int] = dataclasses.field(repr=False)
    logits: Tensor = dataclasses.field(repr=False)
    scores: Tensor | None = dataclasses.field(repr=False)
    attention: Tensor | None = dataclasses.field(repr=False)
    slots: Tensor = dataclasses.field(repr=False)
    timings: dict[str, float]
    ttft_seconds: float
    speedup_bound: float
    selector: str
    question: str = ""
    selection_cost: Cost = NO_COST
    plan: Plan | None = None
    sources: Sequence[Source | None] = ()
