"""``attention-norm``: slots by the attention they get from the query (2603.05353, equation 7)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ifkv.backends.base import Reduction
from ifkv.cost import Cost, ModelShape, scoring_cost
from ifkv.positions import Geometry
from ifkv.scoring import (
    Scoring,
    attention_norm,
    mean_over_layers,
    measure_query,
    run_scorings,
)
from ifkv.selectors.budget import Budget
from ifkv.selectors.geometry import in_geometry
from ifkv.selectors.options import DEFAULT_LAYERS, Layers
from ifkv.selectors.protocol import Ranked, Request, Selection
from ifkv.selectors.registry import register

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from ifkv.scoring import Measure
    from ifkv.stitched_cache import StitchedCache

Query = Literal["prompt", "question", "both"]


@register
@dataclasses.dataclass(frozen=True)
class AttentionNorm(Ranked):
    """Slots by the attention they get from the query, as :func:`ifkv.score` has it.

    InfoFlow KV (2603.05353). The paper's text sums over query tokens, its released code takes the
    L2 norm; it scores in layers 22 to 25 with the bare question.

    Costs the query's way to the deepest scoring layer: with Q query tokens, T slots, P elements of
    a layer's matrices, W = heads times head_dim and Ls scoring layers up to number d, about
    ``2 Q P d + 4 Q T W (d + 1) + 2 Q T W Ls`` operations.

    Attributes:
        layers: Scoring layers.
        query: Which tokens score; ``both`` adds up the scores of two passes.
        reduction: Over query tokens.
        geometry: Positions of the documents while they are scored. Any but ``global`` stitches
            the request's documents once more.
    """

    name: ClassVar[str] = "attention-norm"
    paper: ClassVar[str] = "InfoFlow KV, arXiv 2603.05353"
    only_scores: ClassVar[bool] = True

    layers: Layers = DEFAULT_LAYERS
    query: Query = "prompt"
    reduction: Reduction = "l2"
    geometry: Geometry = "global"

    def rank(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[Tensor, Cost]:
        """See :meth:`Ranked.rank`."""
        scored, cost = in_geometry(model, cache, request, self.geometry)
        layers = self.layers.within(len(cache.layers))
        scores, spent = measured(
            model, scored, queries_of(request, self.query), layers, attention_norm(self.reduction)
        )
        return scores, cost + spent

    def select_many(
        self,
        model: PreTrainedModel,
        caches: Sequence[StitchedCache],
        requests: Sequence[Request],
        budget: Budget | float,
    ) -> list[Selection]:
        """See :meth:`Selector.select_many`; the queries of all requests run in one pass."""
        allowed = Budget.of(budget)
        if type(self) is not AttentionNorm or allowed.everything or allowed.nothing or not caches:
            return super().select_many(model, caches, requests, allowed)
        shape = ModelShape.of(model)
        layers = self.layers.within(shape.num_layers)
        jobs, costs = [], []
        for cache, request in zip(caches, requests, strict=True):
            scored, cost = in_geometry(model, cache, request, self.geometry)
            for query in queries_of(request, self.query):
                jobs.append(Scoring.checked(model, scored, query))
                cost += scoring_cost(shape, len(query), cache.context_length, layers)
            costs.append(cost)
        norms = run_scorings(model, jobs, layers, attention_norm(self.reduction))
        passes = len(jobs) // len(caches)
        chosen = []
        for index, (cache, request) in enumerate(zip(caches, requests, strict=True)):
            own = norms[index * passes : (index + 1) * passes]
            scores = torch.stack([mean_over_layers(each) for each in own]).sum(dim=0)
            slots = allowed.pick(cache, scores, request.groups)
            chosen.append(Selection(slots, scores, costs[index]))
        return chosen


def queries_of(request: Request, query: Query) -> list[Sequence[int]]:
    """Token ids of the scoring passes a query asks for."""
    both: dict[Query, Sequence[int]] = {
        "prompt": request.prompt_ids,
        "question": request.question_ids,
    }
    return list(both.values()) if query == "both" else [both[query]]


def measured(
    model: PreTrainedModel,
    cache: StitchedCache,
    queries: Sequence[Sequence[int]],
    layers: list[int],
    measure: Measure,
    fuse: Callable[[Tensor], Tensor] = lambda per_layer: per_layer.mean(dim=0),
) -> tuple[Tensor, Cost]:
    """Scores ``[T]`` of one or several passes, fused over the layers and added up.

    Args:
        model: A patched model.
        cache: The cache to score.
        queries: Token ids of each pass.
        layers: Where to measure, ascending.
        measure: What gives ``[T]`` in a layer.
        fuse: Makes ``[T]`` of ``[layers, T]``; the mean by default.

    Returns:
        Float32 scores, and the cost of the passes.
    """
    shape = ModelShape.of(model)
    scores, cost = [], Cost()
    for query in queries:
        per_layer = torch.stack(measure_query(model, cache, query, layers, measure))
        scores.append(fuse(per_layer).to(torch.float32))
        cost += scoring_cost(shape, len(query), cache.context_length, layers)
    return torch.stack(scores).sum(dim=0), cost
