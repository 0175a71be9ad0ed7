"""``oracle``: the true error of each slot, from a full prefill; for evaluation only."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ifkv.backends.base import Reduction
from ifkv.cache.checks import check_answerable
from ifkv.cost import Cost, ModelShape, recompute_cost, scoring_cost
from ifkv.selectors.options import ALL_LAYERS, Layers
from ifkv.selectors.protocol import Ranked, Request
from ifkv.selectors.query_ranked import Query, queries_of
from ifkv.selectors.registry import register
from ifkv.steps.query_pass import QueryView
from ifkv.steps.recompute import recompute
from ifkv.steps.score import attention_norm, mean_over_layers, measure_query

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache

Deviation = Literal["kv", "k", "v", "none"]


@register
@dataclasses.dataclass(frozen=True)
class Oracle(Ranked):
    """Selector by the true error of each slot's keys and values, times its true attention.

    For evaluation only: the whole context is recomputed on a copy, which is a full prefill. With
    ``a_l[j]`` the attention norm of slot j in layer l of that copy, and ``dK``, ``dV`` the errors
    of the stitched keys (rotated) and values,

        s[j] = mean over l of a_l[j] (|dK_l[j]| / rms |K_l| + |dV_l[j]| / rms |V_l|)

    with Euclidean norms over all key heads and root mean squares over the true context's slots, so
    that keys and values, and layers, weigh alike. It knows the error of each slot, but not how
    repairing some slots changes the others. So it is no strict upper bound.

    Costs a prefill of all but prefix and first document (without the last layer's MLP), and the
    query's pass.

    Attributes:
        deviation: Errors that count; ``none`` leaves the true attention alone.
        attention: Whose attention counts: the ``true`` cache's, or the ``stitched`` one's.
        layers: Layers that count.
        query: Tokens that score, as in ``attention-norm``.
        reduction: Over query tokens.
    """

    name: ClassVar[str] = "oracle"
    paper: ClassVar[str] = "none: a reference point"
    evaluation_only: ClassVar[bool] = True

    deviation: Deviation = "kv"
    attention: Literal["true", "stitched"] = "true"
    layers: Layers = ALL_LAYERS
    query: Query = "prompt"
    reduction: Reduction = "l2"

    def rank(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[Tensor, Cost]:
        """Score the slots; see `Ranked.rank`."""
        check_answerable(cache, "the oracle")
        start, total = cache.first_candidate, cache.context_length
        truth = cache.clone()
        rows = torch.arange(start, total)
        recompute(model, truth, rows)
        norm = attention_norm(self.reduction)

        def measure(view: QueryView) -> Tensor:
            return norm(view) * self._error(cache, truth, view.layer_idx)

        seen = truth if self.attention == "true" else cache
        layers = self.layers.within(len(cache.layers))
        shape, scores = ModelShape.of(model), torch.zeros(total, device=model.device)
        cost = recompute_cost(shape, rows, total)
        for query in queries_of(request, self.query):
            scores += mean_over_layers(measure_query(model, seen, query, layers, measure))
            cost += scoring_cost(shape, len(query), total, layers)
        return scores, cost

    def _error(self, cache: StitchedCache, truth: StitchedCache, layer: int) -> Tensor:
        """Compute the relative error of each slot in one layer, ``[T]``."""
        context = slice(0, cache.context_length)
        stale, true = (each.layers[layer].rows(context) for each in (cache, truth))
        total = torch.zeros(cache.context_length, device=cache.token_ids.device)
        for name, old, new in zip("kv", stale, true, strict=True):
            if name in self.deviation:
                total = total + _relative(old[0], new[0])
        return torch.ones_like(total) if self.deviation == "none" else total


def _relative(stale: Tensor, true: Tensor) -> Tensor:
    """Compute ``|stale - true| / rms |true|`` by slot; both ``[kv_heads, T, head_dim]``."""
    dtype = torch.promote_types(true.dtype, torch.float32)
    error = (stale.to(dtype) - true.to(dtype)).square().sum(dim=(0, 2)).sqrt()
    return error / true.to(dtype).square().sum(dim=(0, 2)).mean().sqrt()
