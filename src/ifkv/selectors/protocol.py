"""The protocol of selectors: given a stitched cache and a request, name slots to recompute."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ifkv.cache.checks import check_cache
from ifkv.cost import Cost
from ifkv.selectors.budget import Budget
from ifkv.selectors.options import check_options, spec_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache
    from ifkv.documents.cache import DocumentCache


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """Prompt and question over a stitched cache, as a selector is given them.

    Attributes:
        prompt_ids: Token ids of the whole prompt that follows the documents.
        question_ids: Token ids of the bare question.
        documents: The documents the cache was stitched from, in the order they were given to
            [ifkv.stitch][]; only selectors that score in another geometry than the cache's
            need them.
        groups: Long ``[T]``: the sentence of each slot, for budgets that smooth by sentence
            (`ifkv.selectors.sentence_groups`).
    """

    prompt_ids: Sequence[int]
    question_ids: Sequence[int]
    documents: Sequence[DocumentCache] | None = None
    groups: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """Slots that a selector chose, and their scores.

    Attributes:
        slots: Long ``[k]``, ascending, none of them exact already (`StitchedCache.exact_length`).
        scores: The scores that decided, float ``[T]``; None if nothing had to be scored.
        cost: Cost of the choice, without the recomputation of the chosen slots.
        attention: The query's attention, float ``[T]``, for heat maps: over those scoring layers
            that lie at 55 to 70 % of the depth, or all if there are none. None if the selector
            does not run the query, and if nothing had to be scored.
    """

    slots: Tensor
    scores: Tensor | None = dataclasses.field(repr=False)
    cost: Cost
    attention: Tensor | None = dataclasses.field(default=None, repr=False)


class Selector(ABC):
    """Selector of the slots to recompute, within a budget.

    A selector is a frozen dataclass; its fields are its options, which have defaults and can be
    given in a string (`ifkv.selectors.resolve`). ``str(selector)`` is that string.

    Attributes:
        name: Its name in the registry.
        paper: Its publication.
        evaluation_only: Whether it needs something that a request does not have, such as a full
            prefill.
        only_scores: Whether it reads the cache's rows only in the passes of [ifkv.score][] and
            [ifkv.recompute][], or not at all. Pending tokens of a conversation then join its first
            pass; otherwise they run in a separate pass before it. Each class must set it: it is
            not inherited.
        sensitivities: Whether it uses the sensitivities of [ifkv.documents.sensitivity][]. A
            session with such a selector measures them when documents are added.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    evaluation_only: ClassVar[bool] = False
    only_scores: ClassVar[bool] = False
    sensitivities: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    @abstractmethod
    def select(
        self,
        model: PreTrainedModel,
        cache: StitchedCache,
        request: Request,
        budget: Budget | float,
    ) -> Selection:
        """Choose slots.

        Args:
            model: A patched model.
            cache: A stitched cache in the global geometry; afterwards it is the same, bit for bit.
            request: Prompt and question.
            budget: The number of slots; a plain number is a recompute ratio.

        Returns:
            The selection; equal arguments give equal selections.

        Raises:
            NotPatchedError: The model is not patched.
            InvalidInputError: A bad budget or request.
            FingerprintMismatchError: The cache belongs to another model.
        """

    def select_many(
        self,
        model: PreTrainedModel,
        caches: Sequence[StitchedCache],
        requests: Sequence[Request],
        budget: Budget | float | Sequence[Budget | float],
    ) -> list[Selection]:
        """Choose slots of several requests.

        This method runs `select` for each; a selector that can score all requests in one pass
        overrides it.

        Args:
            model: A patched model.
            caches: For each request its cache.
            requests: For each request its prompt and question.
            budget: Budget for all requests, or one for each.
        """
        budgets = Budget.each(budget, len(caches))
        return [self.select(model, *each) for each in zip(caches, requests, budgets, strict=True)]

    def __str__(self) -> str:
        return spec_of(self)


class Ranked(Selector):
    """Selector that gives every slot a score and takes the highest."""

    @abstractmethod
    def rank(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[Tensor, Cost]:
        """Score the slots; arguments of `select`.

        Returns:
            Finite float scores ``[T]`` (those of exact slots do not matter), and
            the cost of scoring.
        """

    def select(
        self,
        model: PreTrainedModel,
        cache: StitchedCache,
        request: Request,
        budget: Budget | float,
    ) -> Selection:
        """Choose slots; see `Selector.select`. A budget for all or no slots needs no scoring."""
        check_cache(model, cache)
        allowed = Budget.of(budget)
        decided = without_scores(cache, allowed)
        if decided is not None:
            return decided
        scores, cost = self.rank(model, cache, request)
        return Selection(allowed.pick(cache, scores, request.groups), scores, cost)


def without_scores(cache: StitchedCache, budget: Budget) -> Selection | None:
    """Return the selection of a budget for all slots or none; None for any other budget."""
    if budget.everything:
        slots = cache.candidate_slots
    elif budget.nothing:
        slots = torch.zeros(0, dtype=torch.long, device=cache.token_ids.device)
    else:
        return None
    return Selection(slots, None, Cost())
