"""``entropy``: attention, weighted by how focused it is."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ifkv.backends.norms import NORM_BLOCK, hidden_by_window
from ifkv.backends.partial import explicit_logits
from ifkv.cost import Cost, ModelShape, norms_cost
from ifkv.selectors.options import DEFAULT_LAYERS, Layers
from ifkv.selectors.query_ranked import Query, QueryRanked
from ifkv.selectors.registry import register
from ifkv.steps.query_pass import QueryView

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ifkv.steps.query_pass import Measure


@register
@dataclasses.dataclass(frozen=True)
class Entropy(QueryRanked):
    """Selector by attention summed over heads and query tokens, each weighted by its focus.

    With ``A_h[i, j]`` the attention of query token i to slot j in head h, ``p_h[i]`` its
    distribution over the T slots (the attention to other query tokens left out, the rest scaled to
    1) and ``H`` the entropy,

        w_h[i] = 1 - H(p_h[i]) / log T
        s[j]   = mean over layers of mean over heads of sum_i w_h[i] A_h[i, j]

    A head that spreads its attention evenly says nothing about any slot, and weighs 0; one that
    looks at a single slot weighs 1. The released code of 2603.05353 lists an entropy rule without
    publishing it; this definition is our own.

    Costs the same as ``attention-norm``, and the query's products with the keys once more: the
    weights must be known before the sum.

    Attributes:
        layers: Scoring layers.
        query: Tokens that score, as in ``attention-norm``.
    """

    name: ClassVar[str] = "entropy"
    paper: ClassVar[str] = "a baseline named by the code of arXiv 2603.05353; definition our own"
    only_scores: ClassVar[bool] = True

    layers: Layers = DEFAULT_LAYERS
    query: Query = "prompt"

    def measure(self) -> Measure:
        """Return the attention weighted by focus."""
        return focused_attention

    def further_cost(
        self, shape: ModelShape, query_length: int, context_length: int, layers: Sequence[int]
    ) -> Cost:
        """Return the cost of the query's second products with the keys."""
        return norms_cost(shape, query_length, context_length, layers)


def focused_attention(view: QueryView) -> Tensor:
    """Compute attention to each slot in one layer, weighted by focus, ``[T]``; see `Entropy`."""
    mass = torch.zeros_like(view.logsumexp[0])  # [heads, Q]: attention to the context
    weighted = torch.zeros_like(mass)  # sum of A log A
    for attention, logarithm in _attention_blocks(view):
        mass += attention.sum(dim=-1)
        weighted += torch.where(attention > 0, attention * logarithm, 0).sum(dim=-1)
    # Of p = A / mass: H = log(mass) - sum(A log A) / mass.
    entropy = torch.where(mass > 0, mass.log() - weighted / mass, math.inf)
    total = view.context_keys.shape[2]
    focus = (1 - entropy / math.log(total)).clamp(0, 1) if total > 1 else torch.ones_like(mass)
    parts = [
        (attention * focus[..., None]).mean(dim=0).sum(dim=0)
        for attention, _ in _attention_blocks(view)
    ]
    return torch.cat(parts)


def _attention_blocks(view: QueryView) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield attention and its logarithm, block by block of the keys, ``[heads, Q, block]``."""
    for start in range(0, view.context_keys.shape[2], NORM_BLOCK):
        block = slice(start, start + NORM_BLOCK)
        mask = hidden_by_window(view.plan, block, view.spec)
        keys = view.context_keys[:, :, block]
        logits = explicit_logits(view.query, keys, view.spec, mask)
        logarithm = logits.sub_(view.logsumexp[0, ..., None])
        yield logarithm.exp(), logarithm
