"""What tests of selectors share: a request, and what a selector chooses for it."""

from __future__ import annotations

from typing import Any

import ifkv
from ifkv import selectors
from ifkv.selectors import Request, Selection
from ifkv.testing.strategies import Request as Tokens
from scenario import Bench

# Float64 throughout, but for what transformers computes in float32.
ROUNDED = 1e-5
# Every selector, and one with options that change where it looks.
SPECS = [*selectors.names(), "attention-norm:query=both,layers=-1,geometry=hl-tp"]
TOKENS = Tokens([1, 2], [[5, 6, 7], [8, 9, 10, 11, 12], [3, 4], [13] * 4], [20, 21], [19, 20, 21])


def asked(bench: Bench) -> Request:
    """A bench's request, as selectors are given it."""
    return Request(bench.request.prompt, bench.request.query, bench.documents)


def chosen(spec: str, bench: Bench, cache: ifkv.StitchedCache, amount: Any) -> Selection:
    """What the selector of a specification chooses."""
    return selectors.resolve(spec).select(bench.model, cache, asked(bench), amount)
