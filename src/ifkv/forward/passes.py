"""The protocol of ifkv's own passes: one run of rows through the decoder layers.

An *attention pass* decides where each layer's new keys and values go, and what every row attends
to. It is handed to the layers as their cache (transformers asks it where keys and values go) and
as the keyword ``ifkv_pass`` (which travels to the attention function). All its state is its own,
so passes on different models or threads cannot meet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from ifkv.backends.spec import AttentionSpec


class LayerCall(NamedTuple):
    """What a layer hands to the attention of a pass.

    Attributes:
        layer_idx: The layer.
        query: ``[1, heads, rows, head_dim]``, rotated by whatever the run was given.
        keys: What `AttentionPass.update` returned.
        values: What `AttentionPass.update` returned.
        spec: How the layer's rows attend.
    """

    layer_idx: int
    query: Tensor
    keys: Tensor
    values: Tensor
    spec: AttentionSpec


class AttentionPass(Protocol):
    """One run of rows through the layers of a patched model."""

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, **unread: object
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values; return what `attend` shall be given.

        Args:
            keys: ``[1, kv_heads, rows, head_dim]``, rotated by whatever the run was given.
            values: ``[1, kv_heads, rows, head_dim]``.
            layer_idx: The layer.
            **unread: What releases of transformers hand over besides.
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
