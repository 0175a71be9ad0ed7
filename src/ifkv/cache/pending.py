"""Tokens of a context whose rows have not run through all layers yet."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(eq=False)
class PendingTokens:
    """Slots of a context whose keys and values are there in the first layers only, or in none.

    Views of a cache share one object, so that tokens that have run are pending in none of them.

    Attributes:
        slots: Long ``[n]``, ascending, on the CPU; empty once they have run.
        hidden: Input of layer ``layer`` at these slots, ``[1, n, hidden]``.
        layer: The next layer to run; those before it hold the slots' keys and values.
    """

    slots: Tensor
    hidden: Tensor
    layer: int = 0

    def mark_done(self) -> None:
        """Record that the tokens have run through all layers."""
        # Cloned: a view would keep the storage that it is a view of.
        self.slots, self.hidden = self.slots.new_empty(0), self.hidden[:, :0].clone()
