"""Attention spec: the scaling, the mask rule and further settings of a layer, in one object.

The registered attention function makes a layer's spec, and it reaches the kernels unchanged. Only
this file defines the mask rule: the reference backend, the masks for FlashInfer and the tests of
the kernels all use `AttentionSpec.near`.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Settings of the attention in one layer.

    Attributes:
        scaling: Factor on the products of queries and keys.
        window: Sliding window: a row sees keys fewer than this many positions behind it; None has
            no window.
        softcap: Logits x become ``softcap * tanh(x / softcap)``; None leaves them unchanged.
        sinks: A logit per head, ``[heads]``, that takes part in the softmax and has no value; None
            has none.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def visible(self, row: Tensor, key: Tensor) -> Tensor:
        """Return True where a row sees a key.

        Args:
            row: Positions of rows, long, in a shape that broadcasts with ``key``.
            key: Positions of keys, long.

        Returns:
            Bool, of the broadcast shape.
        """
        return self.near(row - key)

    def near(self, distance: Tensor) -> Tensor:
        """Return True where a row sees a key at this distance.

        Args:
            distance: The row's position minus the key's, any integer dtype.

        Returns:
            Bool, of the same shape.
        """
        seen = distance >= 0
        return seen if self.window is None else seen & (distance < self.window)

    def hidden(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Build a mask: True where a row must not attend.

        Args:
            rows: Positions, long ``[rows]``.
            keys: Positions, long ``[n]``.

        Returns:
            Bool ``[rows, n]``.
        """
        return self.visible(rows[:, None], keys).logical_not_()

    def scaled(self, factor: float) -> AttentionSpec:
        """Return the spec for keys that must be multiplied by a factor, such as FP8 keys."""
        return self if factor == 1 else dataclasses.replace(self, scaling=self.scaling * factor)

    @property
    def extras(self) -> dict[str, object]:
        """Return the settings other than scaling and window, by name."""
        asked = {"softcap": self.softcap, "sinks": self.sinks}
        return {name: value for name, value in asked.items() if value is not None}
