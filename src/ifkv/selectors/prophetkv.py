"""``prophetkv``: the question's attention in all layers, fused (after 2602.02579)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ifkv.errors import InvalidInputError
from ifkv.selectors.options import ALL_LAYERS, Layers
from ifkv.selectors.query_ranked import Query, QueryRanked
from ifkv.selectors.registry import register
from ifkv.steps.score import attention_norm

if TYPE_CHECKING:
    from ifkv.cache.stitched import StitchedCache
    from ifkv.steps.query_pass import Measure


@register
@dataclasses.dataclass(frozen=True)
class ProphetKV(QueryRanked):
    """Selector like ProphetKV: each layer proposes attended slots, and proposals are fused.

    ProphetKV (2602.02579) ranks tokens by the user's query and fuses attention measured layer by
    layer into one set, in two stages. No code is published, and its formulas are not reproduced
    here: this is a rule of that kind, not the authors'.

    First stage: in every layer, attention is summed over query tokens, averaged over heads, and
    divided by its sum over the slots that may be selected. So layers that attend mostly to the
    prefix or to the query weigh no less. Each layer proposes its highest ``shortlist`` of these
    slots. Second stage: a slot's score is the mean over layers of its shares, counting only layers
    that proposed it. A thousandth of the mean of all its shares orders slots that no layer
    proposed.

    Costs the same as ``attention-norm`` with all layers scoring.

    Attributes:
        shortlist: Share of the slots that each layer proposes, above 0 and at most 1.
        layers: Layers that propose.
        query: Tokens that score, as in ``attention-norm``.
    """

    name: ClassVar[str] = "prophetkv"
    paper: ClassVar[str] = "after ProphetKV, arXiv 2602.02579"
    only_scores: ClassVar[bool] = True

    shortlist: float = 0.2
    layers: Layers = ALL_LAYERS
    query: Query = "question"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.shortlist <= 1:
            raise InvalidInputError(
                f"prophetkv's option shortlist is {self.shortlist}, but must be above 0 and at "
                "most 1."
            )

    def measure(self) -> Measure:
        """Return the attention summed over query tokens."""
        return attention_norm("sum")

    def fuse(self, cache: StitchedCache, per_layer: Tensor) -> Tensor:
        """Apply the two stages; prefix and first document score 0."""
        start, total = cache.first_candidate, cache.context_length
        proposed = math.ceil(self.shortlist * (total - start))
        shares = torch.zeros_like(per_layer, dtype=torch.float64)
        candidates = per_layer[:, start:].double()
        mass = candidates.sum(dim=1, keepdim=True)
        # In a layer with a sliding window they may get no attention at all.
        shares[:, start:] = torch.where(mass > 0, candidates / mass, 0)
        best = shares[:, start:].argsort(dim=1, descending=True, stable=True)[:, :proposed]
        kept = torch.zeros_like(shares).scatter_(1, best + start, 1.0)
        return (shares * kept).mean(dim=0) + 1e-3 * shares.mean(dim=0)
