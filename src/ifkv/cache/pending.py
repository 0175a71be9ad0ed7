"""Rows of a context that have not run through all layers yet."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    pass


@dataclasses.dataclass(eq=False)
class OwedRows:
    """Slots of a context whose keys and values are there in the first layers only, or in none.

    Views of a cache share it, so that a row that has run is owed by none of them.

    Attributes:
        slots: Long ``[n]``, ascending, on the CPU; empty once they have run.
        hidden: What layer `layer` is to be given, ``[1, n, hidden]``.
        layer: The layer they have come to.
    """

    slots: Tensor
    hidden: Tensor
    layer: int = 0

    def paid(self) -> None:
        """They have run through all layers."""
        # Made anew: a view would keep what it is a view of.
        self.slots, self.hidden = self.slots.new_empty(0), self.hidden[:, :0].clone()
