"""Tiny models, a dense oracle and precision assertions, for tests and extensions of the library.

To check a new family, build a small random model of it and compare the library's results with the
oracle's:

    >>> from ifkv.testing import assert_close, dense_prefill, dense_recompute, dense_stitched
    >>> from ifkv.testing import tiny_model
    >>> model = tiny_model("qwen3")
    >>> context = dense_stitched(model, prefix=[1, 2], documents=[[3, 4, 5], [6, 7]])
    >>> repaired = dense_recompute(model, context, slots=range(7))
    >>> full = dense_prefill(model, context.token_ids)
    >>> assert_close(repaired.values, full.values, what="values after recomputing everything")

Hypothesis strategies are in `ifkv.testing.strategies`, which is not imported here because the
library does not depend on hypothesis.

Belongs here: the dense oracle, tiny models, strategies, precision assertions and `verify`.
Not here: tests themselves, which lie under tests/.
"""

from ifkv.testing.dense import DenseTrace, dense_rows
from ifkv.testing.documents import random_document
from ifkv.testing.models import (
    ROPE_TYPES,
    rope_types,
    shared_tiny_model,
    tiny_model,
    truth_model,
)
from ifkv.testing.oracle import (
    DenseContext,
    dense_forward,
    dense_prefill,
    dense_recompute,
    dense_scores,
    dense_stitched,
)
from ifkv.testing.precision import (
    TOLERANCES,
    assert_bit_equal,
    assert_close,
    assert_within_floor,
)
from ifkv.testing.tiny_configs import (
    ARITHMETICS,
    FAMILIES,
    FIXED_WIDTH,
    LAYERED_WINDOWS,
    ROUTED_FAMILIES,
    SLIDING_FAMILIES,
)
from ifkv.testing.tokenizer import tiny_tokenizer
from ifkv.testing.wide import WideRMSNorm, widen_norms

__all__ = [
    "ARITHMETICS",
    "FAMILIES",
    "FIXED_WIDTH",
    "LAYERED_WINDOWS",
    "ROPE_TYPES",
    "ROUTED_FAMILIES",
    "SLIDING_FAMILIES",
    "TOLERANCES",
    "DenseContext",
    "DenseTrace",
    "WideRMSNorm",
    "assert_bit_equal",
    "assert_close",
    "assert_within_floor",
    "dense_forward",
    "dense_prefill",
    "dense_recompute",
    "dense_rows",
    "dense_scores",
    "dense_stitched",
    "random_document",
    "rope_types",
    "shared_tiny_model",
    "tiny_model",
    "tiny_tokenizer",
    "truth_model",
    "widen_norms",
]
