"""Costs in floating-point operations and bytes, and the bound on speed that follows from them.

Costs are counted from the shapes of the model's modules. A product with a matrix takes two
operations per element and row. Attention takes four per dimension of the query heads and pair of a
row and a key it sees. Norms, rotations and softmax are not counted, nor is the vocabulary's matrix:
it takes one row in every method (`ModelShape.head`). In layers with a sliding window only the pairs
within it are counted, also where a kernel computes the others and masks them. Bytes are those of
weights, keys and values, each read or written once per layer and pass; a window does not lower
them. Hidden states are not counted, because those of one layer fit the processor's caches.
`speedup_bound` is the bound S(r).

Belongs here: operations and bytes of every step, counted from shapes, and the bound on speed.
Not here: seconds; `ifkv.planning` measures a machine and predicts them.
"""

from ifkv.cost.bound import mean_position, speedup_bound
from ifkv.cost.pairs import causal_pairs, query_pairs, slot_pairs, spread_pairs
from ifkv.cost.shape import NO_COST, Cost, ModelShape
from ifkv.cost.steps import (
    decode_cost,
    documents_cost,
    norms_cost,
    prefill_cost,
    recompute_cost,
    scoring_cost,
    stitch_cost,
)

__all__ = [
    "NO_COST",
    "Cost",
    "ModelShape",
    "causal_pairs",
    "decode_cost",
    "documents_cost",
    "mean_position",
    "norms_cost",
    "prefill_cost",
    "query_pairs",
    "recompute_cost",
    "scoring_cost",
    "slot_pairs",
    "speedup_bound",
    "spread_pairs",
    "stitch_cost",
]
