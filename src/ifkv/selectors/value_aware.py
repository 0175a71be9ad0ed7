"""``value-aware``: attention times the size of what is attended to (2406.12335)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ifkv.backends.base import Reduction
from ifkv.cost import Cost, ModelShape
from ifkv.scoring import QueryView, attention_norm
from ifkv.selectors.attention_norm import Query, measured, queries_of
from ifkv.selectors.options import DEFAULT_LAYERS, Layers
from ifkv.selectors.protocol import Ranked, Request
from ifkv.selectors.registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.stitched_cache import StitchedCache


@register
@dataclasses.dataclass(frozen=True)
class ValueAware(Ranked):
    """Attention norm times the L1 norm of the slot's values, layer by layer.

    VATP (2406.12335), there for dropping slots: one that is attended to but whose values are close
    to zero, a sink above all, contributes little to the output. The L1 norm is the mean over the
    key heads'; the product is made in each scoring layer, then averaged.

    Costs what ``attention-norm`` does, and reads the scoring layers' values once more.

    Attributes:
        layers: Scoring layers.
        query: Which tokens score, as in ``attention-norm``.
        reduction: Over query tokens.
    """

    name: ClassVar[str] = "value-aware"
    paper: ClassVar[str] = "VATP, arXiv 2406.12335"
    only_scores: ClassVar[bool] = True

    layers: Layers = DEFAULT_LAYERS
    query: Query = "prompt"
    reduction: Reduction = "l2"

    def rank(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[Tensor, Cost]:
        """See :meth:`Ranked.rank`."""
        norm = attention_norm(self.reduction)

        def measure(view: QueryView) -> Tensor:
            sizes = view.context_values[0].float().abs().sum(dim=-1).mean(dim=0)
            return norm(view) * sizes * view.value_scale

        layers = self.layers.within(len(cache.layers))
        queries = queries_of(request, self.query)
        scores, cost = measured(model, cache, queries, layers, measure)
        rows = cache.context_length * len(layers) * len(queries)
        return scores, cost + Cost(bytes=float(rows * ModelShape.of(model).row_bytes))
