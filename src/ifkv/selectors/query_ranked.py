"""Selectors that rank slots by measures of one pass of the query over the stitched cache."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ifkv.cache.checks import check_stitched
from ifkv.cost import Cost, ModelShape, scoring_cost
from ifkv.selectors.budget import Budget
from ifkv.selectors.options import Layers
from ifkv.selectors.protocol import Ranked, Request, Selection, without_scores
from ifkv.steps.score import Scoring, run_scorings
from ifkv.steps.scoring_layers import default_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache
    from ifkv.steps.query_pass import Measure

Query = Literal["prompt", "question", "both"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Look:
    """Scores and attention of one request's query.

    Attributes:
        scores: Float32 ``[T]``, not yet settled.
        attention: Float ``[T]``, as in `Selection`.
        cost: Cost of the passes.
    """

    scores: Tensor
    attention: Tensor
    cost: Cost


class QueryRanked(Ranked):
    """Selector that scores slots by measures of the query in its scoring layers.

    The query runs up to the deepest scoring layer. Requests of a batch share one pass. A subclass
    defines the measure of a layer. It may also define how layers are fused, how scores are settled,
    which cache is scored, and what a pass costs beyond the query's pass and attention norms.

    Attributes:
        layers: Scoring layers.
        query: Tokens that score; ``both`` adds up the scores of two passes.
    """

    layers: Layers
    query: Query

    @abstractmethod
    def measure(self) -> Measure:
        """Return the measure that gives ``[T]`` in a scoring layer."""

    def fuse(self, cache: StitchedCache, per_layer: Tensor) -> Tensor:
        """Reduce one pass's ``[layers, T]`` to ``[T]``; by default the mean."""
        return per_layer.mean(dim=0)

    def settle(self, model: PreTrainedModel, cache: StitchedCache, scores: Tensor) -> Tensor:
        """Return final scores from the sum over passes, float32 ``[T]``; unchanged by default."""
        return scores

    def scored(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[StitchedCache, Cost]:
        """Return the cache that the query runs over, with the same slots, and its cost."""
        return cache, Cost()

    def further_cost(
        self, shape: ModelShape, query_length: int, context_length: int, layers: Sequence[int]
    ) -> Cost:
        """Return the cost of a pass beyond `ifkv.cost.scoring_cost`."""
        return Cost()

    def rank(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[Tensor, Cost]:
        """Score the slots; see `Ranked.rank`."""
        look = self._look(model, [cache], [request])[0]
        return self.settle(model, cache, look.scores), look.cost

    def _look(
        self,
        model: PreTrainedModel,
        caches: Sequence[StitchedCache],
        requests: Sequence[Request],
    ) -> list[_Look]:
        """Run the queries of one or several requests in one pass."""
        shape = ModelShape.of(model)
        layers = self.layers.within(shape.num_layers)
        jobs, costs = [], []
        for cache, request in zip(caches, requests, strict=True):
            seen, cost = self.scored(model, cache, request)
            for query in queries_of(request, self.query):
                jobs.append(Scoring.checked(model, seen, query))
                cost += scoring_cost(shape, len(query), cache.context_length, layers)
                cost += self.further_cost(shape, len(query), cache.context_length, layers)
            costs.append(cost)
        measured = run_scorings(model, jobs, layers, self.measure())
        passes = len(jobs) // len(caches)
        # For heat maps, use the default scoring layers, if these score: they tell most.
        telling = set(default_layers(shape.num_layers))
        shown = [at for at, layer in enumerate(layers) if layer in telling] or range(len(layers))
        looks = []
        for index, cache in enumerate(caches):
            own = [torch.stack(each) for each in measured[index * passes : (index + 1) * passes]]
            fused = [self.fuse(cache, per_layer).to(torch.float32) for per_layer in own]
            attention = torch.stack([per_layer[shown].mean(dim=0) for per_layer in own]).sum(dim=0)
            looks.append(_Look(torch.stack(fused).sum(dim=0), attention, costs[index]))
        return looks

    def select(
        self,
        model: PreTrainedModel,
        cache: StitchedCache,
        request: Request,
        budget: Budget | float,
    ) -> Selection:
        """Choose slots; see `Ranked.select`."""
        return self.select_many(model, [cache], [request], budget)[0]

    def select_many(
        self,
        model: PreTrainedModel,
        caches: Sequence[StitchedCache],
        requests: Sequence[Request],
        budget: Budget | float | Sequence[Budget | float],
    ) -> list[Selection]:
        """Choose slots; see `Selector.select_many`. All queries run in one pass."""
        budgets = Budget.each(budget, len(caches))
        if type(self).select is not QueryRanked.select:
            return super().select_many(model, caches, requests, budgets)
        for cache in caches:
            check_stitched(cache)  # Scoring.checked compares it with the model
        asked = list(zip(caches, requests, budgets, strict=True))
        scored = [at for at, own in enumerate(asked) if without_scores(own[0], own[2]) is None]
        looks: dict[int, _Look] = {}
        if scored and type(self).rank is QueryRanked.rank:
            seen = [caches[at] for at in scored], [requests[at] for at in scored]
            looks = dict(zip(scored, self._look(model, *seen), strict=True))
        found = []
        for at, own in enumerate(asked):
            if at in looks:
                found.append(self._chosen(model, *own, looks[at]))
            else:
                found.append(super().select(model, *own))
        return found

    def _chosen(
        self,
        model: PreTrainedModel,
        cache: StitchedCache,
        request: Request,
        budget: Budget,
        look: _Look,
    ) -> Selection:
        scores = self.settle(model, cache, look.scores)
        slots = budget.pick(cache, scores, request.groups)
        return Selection(slots, scores, look.cost, look.attention.to(torch.float32))


def queries_of(request: Request, query: Query) -> list[Sequence[int]]:
    """Return the token ids of each scoring pass."""
    both: dict[Query, Sequence[int]] = {
        "prompt": request.prompt_ids,
        "question": request.question_ids,
    }
    return list(both.values()) if query == "both" else [both[query]]
