"""Reports: a question's context tokens, their scores, and the ways of answering compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from ifkv.errors import InvalidInputError
from ifkv.generation.finish_reason import cut_sign
from ifkv.report.pieces import token_pieces


@dataclasses.dataclass(frozen=True)
class AnswerRow:
    """Measurements of one way of answering the question.

    Attributes:
        way: Name of the way, such as "full prefill".
        ttft_seconds: Seconds from the question's arrival to the first token's logits.
        answer: The answer's text.
        speedup: Full prefill's time over this way's; None if there is nothing to compare with.
        bound: S(r), the speed-up that the count of operations allows; None if there is none.
        kl: Mean KL divergence to full prefill over the answer, in nats; None if not measured.
        cut: Note that the answer was cut off; empty if it was not.
    """

    way: str
    ttft_seconds: float
    answer: str
    speedup: float | None = None
    bound: float | None = None
    kl: float | None = None
    cut: str = ""

    @property
    def share_of_bound(self) -> float | None:
        """Return the measured speed-up as a share of S(r); None if either is unknown."""
        if self.speedup is None or not self.bound:
            return None
        return self.speedup / self.bound


@dataclasses.dataclass(frozen=True)
class Report:
    """Report on one question over its stitched context.

    Attributes:
        question: The question.
        token_texts: Text of each slot ``[T]``; joined, they are the decoded context.
        scores: Score of each slot ``[T]``, not negative: the attention of the question, or the
            score by which tokens were selected.
        recomputed: Slots that were recomputed.
        document_slices: Slots of each document, in the cache's order.
        prefix_length: Slots before the first document, P.
        order: For each document of the cache, its index among those asked.
        rows: The ways compared, in the order in which they are shown.
        titles: Names of the documents in the cache's order; where empty, the opening words are
            shown.
        answer: The answer's text, with a note if it was cut off; shown if no ways are compared.
        timings: Seconds of each step up to the first token, and of ``decode`` after it.
        ttft_seconds: Seconds from the question's arrival to the first token's logits; None if not
            known.
        bound: S(r), as in `AnswerRow`.
        measure: Kind of the scores, in a word: attention, or another selector's score.
        scored: True if ``scores`` were measured; otherwise they are all equal and show nothing.
    """

    question: str
    token_texts: Sequence[str]
    scores: Sequence[float]
    recomputed: AbstractSet[int]
    document_slices: Sequence[slice]
    prefix_length: int
    order: Sequence[int]
    rows: Sequence[AnswerRow] = ()
    titles: Sequence[str] = ()
    answer: str = ""
    timings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ttft_seconds: float | None = None
    bound: float | None = None
    measure: str = "attention"
    scored: bool = True

    def __post_init__(self) -> None:
        length = len(self.token_texts)
        if len(self.scores) != length:
            raise InvalidInputError(
                f"{length} token texts but {len(self.scores)} scores; each slot has one of each."
            )
        for name, found in (("order", self.order), ("titles", self.titles)):
            if found and len(found) != len(self.document_slices):
                raise InvalidInputError(
                    f"{name} has {len(found)} entries for {len(self.document_slices)} documents; "
                    "give one for each."
                )
        # Slots in between are earlier turns of a conversation, which are not shown.
        stop = self.prefix_length
        for part in self.document_slices:
            if part.start < stop or part.stop < part.start or part.step not in (None, 1):
                raise InvalidInputError(
                    f"document slice {part} should begin at slot {stop} or after it: documents "
                    "follow the prefix and one another."
                )
            stop = part.stop
        if stop > length:
            raise InvalidInputError(f"the documents end at slot {stop}, the context at {length}.")
        if outside := sorted(slot for slot in self.recomputed if not 0 <= slot < length):
            raise InvalidInputError(f"recomputed slot {outside[0]} is outside [0, {length}).")

    @classmethod
    def from_answer(
        cls,
        tokenizer: Any,
        question: str,
        answer: Any,
        *,
        rows: Sequence[AnswerRow] = (),
        titles: Sequence[str] = (),
    ) -> Report:
        """Build the report of an answer that [ifkv.Session.ask][] gave.

        Args:
            tokenizer: The session's tokenizer.
            question: The question.
            answer: The answer. Without scores (ratio 0 or 1) every token counts the same.
            rows: The ways compared.
            titles: Names of the documents, in the order in which they were given; the answer's
                sources if not given.
        """
        titles = titles or ["" if source is None else str(source) for source in answer.sources]
        ids = answer.context_ids.tolist()
        cut = cut_sign(answer.finish_reason, len(answer.token_ids))
        slices = list(answer.document_slices)
        prefix_length = slices[0].start if slices else len(ids)
        texts: list[str] = []
        # Each document is decoded alone: a character cut at its end does not continue in the next.
        for part in slices:
            texts += token_pieces(tokenizer, ids[len(texts) : part.start])
            texts += token_pieces(tokenizer, ids[part])
        texts += token_pieces(tokenizer, ids[len(texts) :])
        shown = answer.scores if answer.attention is None else answer.attention
        scores = [1.0] * len(ids) if shown is None else shown.tolist()
        return cls(
            question=question,
            token_texts=texts,
            scores=scores,
            recomputed=frozenset(answer.slots.tolist()),
            document_slices=slices,
            prefix_length=prefix_length,
            order=list(answer.order),
            rows=tuple(rows),
            titles=[titles[index] for index in answer.order] if titles else [],
            answer=f"{answer.text} [{cut}]" if cut else answer.text,
            timings=dict(answer.timings),
            ttft_seconds=answer.ttft_seconds,
            bound=answer.speedup_bound,
            measure="score" if answer.attention is None else "attention",
            scored=shown is not None,
        )
