"""Check that every layer calls the pass it is given, and refuse a layer that does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ifkv.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ifkv.forward.passes import AttentionPass, LayerCall


class WatchedPass:
    """Wrapper of an attention pass that checks the calls of each layer.

    A layer that keeps its keys and values, attends in another way, or has the index of another
    layer would silently compute something wrong.

    Args:
        attention_pass: The pass.
    """

    def __init__(self, attention_pass: AttentionPass):
        self._pass = attention_pass
        self._layer_idx = -1
        self._done: list[str] = []

    def expect(self, layer_idx: int) -> None:
        """Set the layer that runs next."""
        self._layer_idx = layer_idx
        self._done = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, **unread: object
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values like `AttentionPass.update`."""
        self._take("update", layer_idx)
        return self._pass.update(keys, values, layer_idx, **unread)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(self, call: LayerCall) -> Tensor:
        """Compute a layer's attention like `AttentionPass.attend`."""
        self._take("attend", call.layer_idx)
        return self._pass.attend(call)

    def _take(self, what: str, layer_idx: int) -> None:
        if layer_idx != self._layer_idx:
            raise UnsupportedModelError(
                f"the layer in place {self._layer_idx} says that it is layer_idx {layer_idx}; set "
                "self_attn.layer_idx of every layer to its place (layers that were removed leave "
                "the others misnumbered)."
            )
        self._done.append(what)

    def check(self, layer: nn.Module) -> None:
        """Raise if the layer did not follow the protocol of passes.

        Raises:
            UnsupportedModelError: It did not call `update` once and then `attend` once.
        """
        if self._done != ["update", "attend"]:
            steps = " and ".join(self._done) or "nothing"
            raise UnsupportedModelError(
                f"layer {self._layer_idx} ({type(layer).__name__}) should hand its keys and values "
                "to the cache it is given, and then its attention to transformers' attention "
                f"interface, once; it came with {steps}. ifkv does not fit such a layer."
            )
