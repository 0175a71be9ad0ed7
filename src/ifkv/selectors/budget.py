"""Budgets: the number of slots that a selector may take, and the smoothing of its scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.cache.checks import check_stitched
from ifkv.errors import InvalidInputError
from ifkv.steps.select import budget as slots_of_ratio
from ifkv.steps.select import check_scores, top_slots

if TYPE_CHECKING:
    from ifkv.cache.stitched import StitchedCache


@dataclasses.dataclass(frozen=True)
class Budget:
    """Number of slots to take: exactly one of ratio, number and mass.

    Attributes:
        ratio: Share of the context: ``max(1, floor(ratio T))`` slots, none if it is 0.
        number: Number of slots.
        mass: Share of the scores' sum over all slots that may be selected: the fewest slots that
            cover it. Scores must not be negative; if they are column sums of attention
            (``reduction="sum"``), it is the share of the query's attention to these slots.
        cap: With ``mass``: the most slots, as a recompute ratio.
        window: Smooth the scores first: replace each by the mean over this odd number of slots of
            its document, centred; fewer at a document's ends.
        sentences: Smooth the scores first: every slot gets the mean of its sentence. So whole
            sentences are taken, highest mean first, and only the last may be cut.

    >>> Budget.of(0.15) == Budget(ratio=0.15)
    True
    """

    ratio: float | None = None
    number: int | None = None
    mass: float | None = None
    cap: float = 1.0
    window: int | None = None
    sentences: bool = False

    def __post_init__(self) -> None:
        given = [n for n in ("ratio", "number", "mass") if getattr(self, n) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise InvalidInputError(
                f"a budget is exactly one of ratio, number and mass; {found} was given."
            )
        if self.ratio is not None:
            slots_of_ratio(1, self.ratio)
        number: Any = self.number
        if number is not None and (
            isinstance(number, bool) or not isinstance(number, Integral) or number < 0
        ):
            raise InvalidInputError(
                f"number is {number!r}, but must be a whole number of slots, 0 or more; a share "
                "of the context is a ratio."
            )
        for what in ("mass", "cap"):
            share: Any = getattr(self, what)
            if share is None:
                continue
            try:
                slots_of_ratio(1, share)
            except InvalidInputError:
                raise InvalidInputError(
                    f"{what} is {share!r}, but must lie between 0 and 1."
                ) from None
        if self.cap != 1 and self.mass is None:
            raise InvalidInputError(
                f"cap is {self.cap!r}, but only a budget by mass has a cap; give mass=."
            )
        window: Any = self.window
        if window is not None and (
            isinstance(window, bool)
            or not isinstance(window, Integral)
            or window < 1
            or window % 2 == 0
        ):
            raise InvalidInputError(f"window is {window!r}, but must be an odd number of slots.")
        if window is not None and self.sentences:
            raise InvalidInputError("window and sentences are two ways to smooth; give one.")

    @classmethod
    def of(cls, value: Budget | float) -> Budget:
        """Return a budget; a number is a recompute ratio."""
        return value if isinstance(value, Budget) else cls(ratio=value)

    @classmethod
    def each(cls, value: Budget | float | Sequence[Budget | float], count: int) -> list[Budget]:
        """Return one budget for each of ``count`` requests.

        Args:
            value: The budget of all of them, or a list with one for each.
            count: The number of requests.

        Raises:
            InvalidInputError: The list has another length, or holds a bad budget.
        """
        if not isinstance(value, Budget) and isinstance(value, Sequence):
            if len(value) != count:
                raise InvalidInputError(
                    f"{len(value)} budgets were given for {count} requests; give one for all, or "
                    "one for each."
                )
            return [cls.of(one) for one in value]
        return [cls.of(value)] * count

    @property
    def nothing(self) -> bool:
        """True if the budget is for no slot."""
        return 0 in (self.ratio, self.number, self.mass) or self.cap == 0

    @property
    def everything(self) -> bool:
        """True if the budget is for every slot of any context."""
        return self.ratio == 1 or (self.mass == 1 and self.cap == 1)

    def pick(self, cache: StitchedCache, scores: Tensor, groups: Tensor | None = None) -> Tensor:
        """Pick the slots with the highest scores within the budget.

        Args:
            cache: The stitched cache that was scored.
            scores: ``[T]``, finite.
            groups: Long ``[T]``: the sentence of each slot; needed if `sentences`.

        Returns:
            Long ``[k]``, ascending, without slots that are exact. Of equal scores the lower
            slot wins; with the same scores and kind of budget a larger one contains a smaller.

        Raises:
            InvalidInputError: Scores are not finite or not ``[T]``, negative under a budget by
                mass, or ``groups`` is missing.
        """
        check_stitched(cache)
        check_scores(cache, scores)
        smooth = self.smoothed(cache, scores, groups)
        return top_slots(cache, smooth, self._count(cache, smooth))

    def _count(self, cache: StitchedCache, scores: Tensor) -> int:
        total = cache.budget_length
        if self.nothing:
            return 0
        if self.ratio is not None:
            return slots_of_ratio(total, self.ratio)
        if self.number is not None:
            return self.number
        assert self.mass is not None
        candidates = scores[cache.candidate_slots.to(scores.device)].double()
        if bool((candidates < 0).any()):
            raise InvalidInputError(
                f"scores go down to {float(candidates.min()):g}, but a budget by mass needs scores "
                "that are not negative; give a ratio or a number instead."
            )
        limit = min(slots_of_ratio(total, self.cap), len(candidates))
        if self.mass == 1 or limit == 0:
            return limit
        covered = candidates.sort(descending=True, stable=True).values.cumsum(0)
        # One slot more than those whose sum stays below the share, so at least one.
        short = int((covered < self.mass * covered[-1]).sum())
        return min(short + 1, limit)

    def smoothed(self, cache: StitchedCache, scores: Tensor, groups: Tensor | None) -> Tensor:
        """Smooth scores as `pick` does; arguments of `pick`."""
        if self.window is None and not self.sentences:
            return scores
        smooth = scores.double()
        if self.sentences:
            return _mean_of_groups(smooth, _checked_groups(groups, cache.context_length))
        assert self.window is not None
        for rows in cache.document_slices:
            part = smooth[rows]
            reach = min(self.window // 2, len(part))
            mean = torch.nn.functional.avg_pool1d(
                part[None, None], 2 * reach + 1, stride=1, padding=reach, count_include_pad=False
            )
            smooth[rows] = mean[0, 0]
        return smooth


def _checked_groups(groups: Tensor | None, length: int) -> Tensor:
    if groups is None:
        raise InvalidInputError(
            "this budget smooths by sentence, but the request says of no slot to which sentence it "
            "belongs; give Request(groups=ifkv.selectors.sentence_groups(tokenizer, cache))."
        )
    if groups.shape != (length,) or groups.dtype.is_floating_point:
        raise InvalidInputError(
            f"groups are {groups.dtype} of shape {tuple(groups.shape)}, but must be one whole "
            f"number for each of {length} slots."
        )
    return groups


def _mean_of_groups(scores: Tensor, groups: Tensor) -> Tensor:
    """Replace each score by its group's mean, ``[T]``."""
    _, index = groups.to(scores.device).unique(return_inverse=True)
    sums = scores.new_zeros(int(index.max()) + 1).index_add_(0, index, scores)
    means: Tensor = sums / index.bincount()
    return means[index]


def sentence_groups(tokenizer: Any, cache: StitchedCache) -> Tensor:
    """Find the sentence that each slot belongs to, from the tokens' texts.

    A sentence ends with a token whose text, without spaces and closing quotes or brackets, ends in
    ``.``, ``!`` or ``?``, or that has a line break; a document ends one, too. A rule for prose: a
    dot in a number or an abbreviation ends a sentence, which costs little here.

    Args:
        tokenizer: The tokenizer that made the token ids.
        cache: The stitched cache.

    Returns:
        Long ``[T]``, ascending, on the CPU; the prefix is one sentence.
    """
    check_stitched(cache)
    ids, inverse = cache.token_ids.cpu().unique(return_inverse=True)
    texts = [tokenizer.decode([token]) for token in ids.tolist()]
    closing = torch.tensor([_ends_sentence(text) for text in texts], dtype=torch.bool)
    ends = closing[inverse] if len(ids) else torch.zeros(0, dtype=torch.bool)
    ends[: cache.prefix_length] = False
    for rows in cache.document_slices:
        ends[rows.stop - 1] = True
        if rows.start > 0:
            ends[rows.start - 1] = True
    return torch.cat((ends.new_zeros(1), ends))[:-1].long().cumsum(0)


def _ends_sentence(text: str) -> bool:
    return "\n" in text or text.rstrip(" \t\"'”’)]}»").endswith((".", "!", "?"))
