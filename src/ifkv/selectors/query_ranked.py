"""Rules that rank slots by what one pass of the query over the stitched cache measures."""

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
    """What one request's query sees.

    Attributes:
        scores: Float32 ``[T]``, not yet settled.
        attention: Float ``[T]``, as in `Selection`.
        cost: What looking cost.
    """

    scores: Tensor
    attention: Tensor
    cost: Cost


class QueryRanked(Ranked):
    """Runs the query as far as the deepest scoring layer and scores slots by what it sees there.

    Requests of a batch share one pass. A class says what is measured in a layer, and may say how
    layers are put together, how the scores are settled, what to score instead of the request's own
    cache, and what a pass costs beyond running the query and taking its attention norms.

    Attributes:
        layers: Scoring layers.
        query: Which tokens score; ``both`` adds up the scores of two passes.
    """

    layers: Layers
    query: Query

    @abstractmethod
    def measure(self) -> Measure:
        """What gives ``[T]`` in a scoring layer."""

    def fuse(self, cache: StitchedCache, per_layer: Tensor) -> Tensor:
        """Makes ``[T]`` of one pass's ``[layers, T]``; the mean by default."""
        return per_layer.mean(dim=0)

    def settle(self, model: PreTrainedModel, cache: StitchedCache, scores: Tensor) -> Tensor:
        """The final scores of the sum over passes, float32 ``[T]``; the same by default."""
        return scores

    def scored(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[StitchedCache, Cost]:
        """What the query runs over, with the same slots, and what making it cost."""
        return cache, Cost()

    def further_cost(
        self, shape: ModelShape, query_length: int, context_length: int, layers: Sequence[int]
    ) -> Cost:
        """What a pass costs beyond `ifkv.cost.scoring_cost`."""
        return Cost()

    def rank(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[Tensor, Cost]:
        """See `Ranked.rank`."""
        look = self._look(model, [cache], [request])[0]
        return self.settle(model, cache, look.scores), look.cost

    def _look(
        self,
        model: PreTrainedModel,
        caches: Sequence[StitchedCache],
        requests: Sequence[Request],
    ) -> list[_Look]:
        """What the queries of one or several requests see, in one pass."""
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
        # People are shown the layers that tell most, where they score: others look near and far.
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
        """See `Ranked.select`."""
        return self.select_many(model, [cache], [request], budget)[0]

    def select_many(
        self,
        model: PreTrainedModel,
        caches: Sequence[StitchedCache],
        requests: Sequence[Request],
        budget: Budget | float | Sequence[Budget | float],
    ) -> list[Selection]:
        """See `Selector.select_many`; the queries of all requests run in one pass."""
        budgets = Budget.each(budget, len(caches))
        if type(self).select is not QueryRanked.select:
            return super().select_many(model, caches, requests, budgets)
        for cache in caches:
            check_stitched(cache)  # and whether it is the model's before it is run over
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
    """Token ids of the scoring passes a query asks for."""
    both: dict[Query, Sequence[int]] = {
        "prompt": request.prompt_ids,
        "question": request.question_ids,
    }
    return list(both.values()) if query == "both" else [both[query]]
