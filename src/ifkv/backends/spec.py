"""How rows attend, in one object: the factor on the logits, the mask, and what else a layer does.

A layer's spec travels from the registered attention function to the kernels as it is. The rule of
the mask stands here and nowhere else: the reference backend, the masks for FlashInfer and the tests
of the kernels all take it from `AttentionSpec.near`.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionSpec:
    """How the rows of one layer attend.

    Attributes:
        scaling: Factor on the products of queries and keys.
        window: A row sees keys fewer than this many positions behind it; None sees all.
        softcap: The logits x are replaced by ``softcap * tanh(x / softcap)``; None leaves them.
        sinks: A logit per head, ``[heads]``, that takes part in the softmax without a value; None
            has none.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def visible(self, row: Tensor, key: Tensor) -> Tensor:
        """True where a row sees a key.

        Args:
            row: Positions of rows, long, of a shape that broadcasts with ``key``.
            key: Positions of keys, long.

        Returns:
            Bool, of the broadcast shape.
        """
        return self.near(row - key)

    def near(self, distance: Tensor) -> Tensor:
        """True where a key is this many positions behind a row and the row sees it.

        Args:
            distance: The row's position minus the key's, any whole numbers.

        Returns:
            Bool, of the same shape.
        """
        seen = distance >= 0
        return seen if self.window is None else seen & (distance < self.window)

    def hidden(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Build a mask: True where a row must not look.

        Args:
            rows: Positions, long ``[rows]``.
            keys: Positions, long ``[n]``.

        Returns:
            Bool ``[rows, n]``.
        """
        return self.visible(rows[:, None], keys).logical_not_()

    def scaled(self, factor: float) -> AttentionSpec:
        """Return the spec for keys that stand for themselves times a factor, as 8-bit ones do."""
        return self if factor == 1 else dataclasses.replace(self, scaling=self.scaling * factor)

    @property
    def extras(self) -> dict[str, object]:
        """What is asked for beyond a scaling and a window, by name."""
        asked = {"softcap": self.softcap, "sinks": self.sinks}
        return {name: value for name, value in asked.items() if value is not None}
