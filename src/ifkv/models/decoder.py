"""Decoder stack, layers, embedding and head of a model: the parts that ifkv runs itself."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

# Path of the decoder stack in models of a class, found once.
_paths: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()


class DecoderView:
    """View of a causal language model: its decoder stack, the stack's parts, and the head.

    A view is made when it is needed and caches nothing, so it always shows the current model.

    Attributes:
        stack: The module whose layers upstream's forward runs; ``model.get_decoder()`` finds it.

    Args:
        model: A causal language model, patched or not.
    """

    __slots__ = ("_model", "stack")

    def __init__(self, model: PreTrainedModel):
        self._model: Any = model
        self.stack: Any = _stack_of(model)

    @property
    def config(self) -> PreTrainedConfig:
        """Return the config that the stack reads; the overlay if the model is patched."""
        config: PreTrainedConfig = self.stack.config
        return config

    @property
    def layers(self) -> list[Any]:
        """Return the layers that upstream's forward runs, in order.

        Upstream runs ``layers[: config.num_hidden_layers]`` and reads the count at every forward.
        If the count was lowered, the model keeps its other layers and does not run them.
        """
        stack = self.stack
        return list(stack.layers[: stack.config.num_hidden_layers])

    @property
    def num_layers(self) -> int:
        """Return the number of layers that upstream's forward runs."""
        stack = self.stack
        return len(range(len(stack.layers))[: stack.config.num_hidden_layers])

    @property
    def live_settings(self) -> tuple[object, ...]:
        """Return the settings that upstream's forward reads at every call.

        They can change while the model is patched: the number of layers, the config's sliding
        window, and the sliding window and scaling of each attention.
        """
        read: list[object] = [self.num_layers, getattr(self.config, "sliding_window", None)]
        for layer in self.layers:
            attention = getattr(layer, "self_attn", None)
            read += [getattr(attention, name, None) for name in ("scaling", "sliding_window")]
        return tuple(read)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Return the sliding window of each layer; None for a layer without one.

        An attention has its own window in some families, and reads the config's in others.
        """
        stated = getattr(self.config, "sliding_window", None)
        return tuple(getattr(layer.self_attn, "sliding_window", stated) for layer in self.layers)

    @property
    def rotary(self) -> Any:
        """Return the module that makes cosines and sines."""
        return self.stack.rotary_emb

    @property
    def head(self) -> nn.Module | None:
        """Return the language-model head; None if the model has none."""
        head: nn.Module | None = self._model.get_output_embeddings()
        return head

    def embed(self, token_ids: Tensor) -> Tensor:
        """Compute the input of the first layer.

        Args:
            token_ids: Long ``[rows]``, on the model's device.

        Returns:
            ``[1, rows, hidden]``.
        """
        hidden: Tensor = self.stack.embed_tokens(token_ids[None])
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of every row.

        Args:
            hidden: Output of the last layer, ``[1, rows, hidden]``.

        Returns:
            ``[rows, vocabulary]``.
        """
        head: Any = self.head
        logits: Tensor = head(self.stack.norm(hidden))
        return logits[0]


def _stack_of(model: PreTrainedModel) -> Any:
    """Find the decoder stack; its path is the same in all models of a class."""
    kind = type(model)
    path = _paths.get(kind)
    if path is None:
        # Stand-ins for a model may have only the older name.
        found = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        if "forward" not in vars(kind):  # a wrapper around models of any class
            return found
        path = next((path for path, module in model.named_modules() if module is found), None)
        if path is None:
            return found
        _paths[kind] = path
    return model.get_submodule(path)
