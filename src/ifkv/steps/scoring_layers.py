"""The layers in which a query is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ifkv.errors import InvalidInputError
from ifkv.utils.checks import whole_numbers

# Range of the depth whose layers score by default: the paper's layers 22 to 25 of 40 (Qwen3-14B)
# and their neighbours in shallower models.
DEFAULT_DEPTH = (0.55, 0.70)


def default_layers(depth: int) -> list[int]:
    """Return the default scoring layers of a model with ``depth`` layers.

    >>> default_layers(40), default_layers(3)
    ([22, 23, 24, 25, 26, 27], [1, 2])
    """
    return layers_between(*DEFAULT_DEPTH, depth)


def layers_between(start: float, stop: float, depth: int) -> list[int]:
    """Return the layers in a range of the depth, given as shares of it; at least one.

    >>> layers_between(0.5, 1.0, 4), layers_between(1.0, 1.0, 4)
    ([2, 3], [3])
    """
    first = min(math.floor(start * depth), depth - 1)
    return list(range(first, max(first + 1, math.ceil(stop * depth))))


def chosen_layers(depth: int, layers: Sequence[int] | None) -> list[int]:
    """Check scoring layers; return them ascending and counted from 0, or the default ones."""
    if layers is None:
        return default_layers(depth)
    given = whole_numbers(layers, "layers")
    chosen = sorted({layer + depth if layer < 0 else layer for layer in given})
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth:
        raise InvalidInputError(
            f"layers is {given}, but must name at least one of the model's {depth} layers: "
            f"0 to {depth - 1}, or -{depth} to -1 from the end."
        )
    return chosen
