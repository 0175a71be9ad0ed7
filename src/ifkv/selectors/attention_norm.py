"""``attention-norm``: slots by the attention they get from the query (2603.05353, equation 7)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from ifkv.backends.base import Reduction
from ifkv.cache.layout import Geometry
from ifkv.selectors.geometry import in_geometry
from ifkv.selectors.options import DEFAULT_LAYERS, Layers
from ifkv.selectors.query_ranked import Query, QueryRanked
from ifkv.selectors.registry import register
from ifkv.steps.score import attention_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache
    from ifkv.cost import Cost
    from ifkv.selectors.protocol import Request
    from ifkv.steps.query_pass import Measure


@register
@dataclasses.dataclass(frozen=True)
class AttentionNorm(QueryRanked):
    """Selector of the slots that get most attention from the query, as in [ifkv.score][].

    InfoFlow KV (2603.05353). The paper's text sums over query tokens, its released code takes the
    L2 norm; it scores in layers 22 to 25 with the bare question.

    Costs the query's pass to the deepest scoring layer: with Q query tokens, T slots, P elements of
    a layer's matrices, W = heads times head_dim and Ls scoring layers up to number d, about
    ``2 Q P d + 4 Q T W (d + 1) + 2 Q T W Ls`` operations.

    Attributes:
        layers: Scoring layers.
        query: Tokens that score; ``both`` adds up the scores of two passes.
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

    def measure(self) -> Measure:
        """Return the norm of [ifkv.score][]."""
        return attention_norm(self.reduction)

    def scored(
        self, model: PreTrainedModel, cache: StitchedCache, request: Request
    ) -> tuple[StitchedCache, Cost]:
        """Return the documents stitched in the geometry that they are scored in."""
        return in_geometry(model, cache, request, self.geometry)
