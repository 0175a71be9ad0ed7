"""What a selector is: it looks at a stitched cache and a request, and names slots to recompute."""

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
    """What is asked over a stitched cache.

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
    """What a selector chose.

    Attributes:
        slots: Long ``[k]``, ascending, none of them in prefix or first document.
        scores: What it was chosen by, float ``[T]``; None if nothing had to be scored.
        cost: What choosing cost, the recomputation of the chosen slots not included.
        attention: What the query looks at, float ``[T]``, for people and pictures: of the scoring
            layers, those at 55 to 70 % of the depth, if there are some. None from a rule that does
            not ask it, and if nothing had to be scored.
    """

    slots: Tensor
    scores: Tensor | None = dataclasses.field(repr=False)
    cost: Cost
    attention: Tensor | None = dataclasses.field(default=None, repr=False)


class Selector(ABC):
    """Chooses the slots to recompute, within a budget.

    A selector is a frozen dataclass; its fields are its options, which have defaults and can be
    given in a string (`ifkv.selectors.resolve`). ``str(selector)`` is that string.

    Attributes:
        name: What it is called in the registry.
        paper: Where it was published.
        evaluation_only: Whether it needs what a request does not have, such as a full prefill.
        only_scores: Whether it reads the cache's rows through the pass of [ifkv.score][] and
            [ifkv.recompute][] alone, or not at all. Tokens that stand before further documents
            of a conversation then run along with its first pass instead of in one of their own.
            Said by each class for itself; it is not inherited.
        sensitivities: Whether it uses what [ifkv.documents.sensitivity][] measures, so that a
            session that chooses by it has it measured when documents are added.
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
            cache: A stitched cache in the global geometry, which is left as it was, bit for bit.
            request: What is asked.
            budget: How many slots; a number is a recompute ratio.

        Returns:
            The selection; the same whenever the arguments are.

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
        """Choose slots of several requests; takes what `select` takes, for each.

        A selector that can look at all of them in one pass does; this one takes them one by one.

        Args:
            model: A patched model.
            caches: For each request its cache.
            requests: What is asked.
            budget: Of all requests, or one for each.
        """
        budgets = Budget.each(budget, len(caches))
        return [self.select(model, *each) for each in zip(caches, requests, budgets, strict=True)]

    def __str__(self) -> str:
        return spec_of(self)


class Ranked(Selector):
    """A selector that gives every slot a score and takes the highest."""

    @abstractmethod
    def rank(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[Tensor, Cost]:
        """Score the slots; takes what `select` takes.

        Returns:
            Finite float scores ``[T]`` (those of prefix and first document do not matter), and
            what scoring cost.
        """

    def select(
        self,
        model: PreTrainedModel,
        cache: StitchedCache,
        request: Request,
        budget: Budget | float,
    ) -> Selection:
        """See `Selector.select`; nothing is scored if the budget is for all or no slots."""
        check_cache(model, cache)
        allowed = Budget.of(budget)
        decided = without_scores(cache, allowed)
        if decided is not None:
            return decided
        scores, cost = self.rank(model, cache, request)
        return Selection(allowed.pick(cache, scores, request.groups), scores, cost)


def without_scores(cache: StitchedCache, budget: Budget) -> Selection | None:
    """The selection of a budget that is for all slots or none; None for any other."""
    if budget.everything:
        slots = cache.candidate_slots
    elif budget.nothing:
        slots = torch.zeros(0, dtype=torch.long, device=cache.token_ids.device)
    else:
        return None
    return Selection(slots, None, Cost())
