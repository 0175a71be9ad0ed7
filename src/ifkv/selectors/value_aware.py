"""``value-aware``: attention times the size of the values (2406.12335)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ifkv.backends.base import Reduction
from ifkv.cost import Cost, ModelShape
from ifkv.selectors.options import DEFAULT_LAYERS, Layers
from ifkv.selectors.query_ranked import Query, QueryRanked
from ifkv.selectors.registry import register
from ifkv.steps.score import attention_norm

if TYPE_CHECKING:
    from ifkv.steps.query_pass import Measure


@register
@dataclasses.dataclass(frozen=True)
class ValueAware(QueryRanked):
    """Selector by attention norm times the L1 norm of the slot's values, layer by layer.

    VATP (2406.12335) drops slots by this product: a slot that gets attention but has values close
    to zero, a sink above all, contributes little to the output. The L1 norm is the mean over the
    key heads'; the product is computed in each scoring layer, then averaged.

    Costs the same as ``attention-norm``, and reads the scoring layers' values once more.

    Attributes:
        layers: Scoring layers.
        query: Tokens that score, as in ``attention-norm``.
        reduction: Over query tokens.
    """

    name: ClassVar[str] = "value-aware"
    paper: ClassVar[str] = "VATP, arXiv 2406.12335"
    only_scores: ClassVar[bool] = True

    layers: Layers = DEFAULT_LAYERS
    query: Query = "prompt"
    reduction: Reduction = "l2"

    def measure(self) -> Measure:
        """Return the attention norm times the size of the values."""
        return attention_norm(self.reduction, by_values=True)

    def further_cost(
        self, shape: ModelShape, query_length: int, context_length: int, layers: Sequence[int]
    ) -> Cost:
        """Return the cost of reading the values once more."""
        return Cost(bytes=float(context_length * len(layers) * shape.row_bytes))
