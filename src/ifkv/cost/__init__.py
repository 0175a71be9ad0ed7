"""What things cost in operations and bytes, and what the arithmetic allows.

Costs are those of the arithmetic a method asks for, counted from the model's own shapes: a product
with a matrix is two operations per element and row; attention four per query head's dimension and
pair of a row and a key it sees. Norms, rotations, softmax and the vocabulary's matrix (one row,
the same for every method; `ModelShape.head` has it) are left out, and a sliding window is not
taken off. Bytes are those of weights, keys and values, each read or written once per layer and
pass; hidden states are left out, since what is made of a row in a layer fits a processor's caches.
`speedup_bound` is the bound S(r).

Belongs here: operations and bytes of every step, counted from shapes, and the bound on speed.
Not here: seconds; `ifkv.planning` measures a machine and predicts them.
"""

from ifkv.cost.bound import mean_position, speedup_bound
from ifkv.cost.shape import NO_COST, Cost, ModelShape
from ifkv.cost.steps import (
    causal_pairs,
    decode_cost,
    documents_cost,
    prefill_cost,
    recompute_cost,
    scoring_cost,
    spread_pairs,
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
    "prefill_cost",
    "recompute_cost",
    "scoring_cost",
    "speedup_bound",
    "spread_pairs",
    "stitch_cost",
]
