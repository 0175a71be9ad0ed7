"""Protocol of attention passes: one run of rows through the decoder layers.

An *attention pass* decides where the new keys and values of each layer go, and what every row
attends to. The layers get it as their cache, which takes keys and values, and as the keyword
``ifkv_pass``, which reaches the attention function. A pass shares no state with other passes, so
models and threads do not interfere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from ifkv.backends.spec import AttentionSpec


class LayerCall(NamedTuple):
    """Arguments of a pass's attention in one layer.

    Attributes:
        layer_idx: Index of the layer.
        query: ``[1, heads, rows, head_dim]``, rotated by the rotation of the run.
        keys: Keys returned by `AttentionPass.update`.
        values: Values returned by `AttentionPass.update`.
        spec: Scaling and mask of the layer.
    """

    layer_idx: int
    query: Tensor
    keys: Tensor
    values: Tensor
    spec: AttentionSpec


class AttentionPass(Protocol):
    """Attention pass: a run of rows through the layers of a patched model."""

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, **unread: object
    ) -> tuple[Tensor, Tensor]:
        """Take the new keys and values of a layer, and return those that `attend` is given.

        Args:
            keys: ``[1, kv_heads, rows, head_dim]``, rotated by the rotation of the run.
            values: ``[1, kv_heads, rows, head_dim]``.
            layer_idx: Index of the layer.
            **unread: Further arguments of some releases of transformers.
        """
        ...

    def attend(self, call: LayerCall) -> Tensor:
        """Compute the attention of all rows in one layer.

        Args:
            call: The layer's queries, keys and values.

        Returns:
            ``[1, rows, heads, head_dim]``.
        """
        ...
