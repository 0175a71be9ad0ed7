"""Example of a selector outside ifkv: it takes the tokens that occur least often.

On the command line: `ifkv ask QUESTION FILES --model MODEL --import examples/rare_tokens.py
--selector rare-tokens:power=2`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from ifkv import selectors
from ifkv.cost import Cost


@selectors.register
@dataclasses.dataclass(frozen=True)
class RareTokens(selectors.Ranked):
    """Selector that ranks each token by how rarely its id occurs in the request's documents."""

    name = "rare-tokens"
    paper = "unpublished"

    # An option of the selector: `rare-tokens:power=2` in a string, RareTokens(power=2) in Python.
    power: float = 1.0

    def rank(self, model: Any, cache: Any, request: selectors.Request) -> tuple[Tensor, Cost]:
        """Return one finite score per slot, and the cost: here no operation of the model."""
        _, index, counts = cache.token_ids.unique(return_inverse=True, return_counts=True)
        return counts[index].double() ** -self.power, Cost()
