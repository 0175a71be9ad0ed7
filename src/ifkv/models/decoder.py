"""The parts of a model that ifkv runs by itself: the one place that says which those are."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

# Where the decoder stack lies in models of a class: looked for once, when one is patched.
_paths: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()


class DecoderView:
    """The decoder stack of a causal language model, its parts, and its head.

    A view is made where it is needed and holds no state, so it always shows the model as it is.

    Attributes:
        stack: The module whose layers upstream's forward runs, as ``model.get_decoder()`` finds it.

    Args:
        model: A causal language model, patched or not.
    """

    __slots__ = ("_model", "stack")

    def __init__(self, model: PreTrainedModel):
        self._model: Any = model
        self.stack: Any = _stack_of(model)

    @property
    def config(self) -> PreTrainedConfig:
        """The config that the stack reads; of a patched model, the overlay."""
        config: PreTrainedConfig = self.stack.config
        return config

    @property
    def layers(self) -> list[Any]:
        """The layers that upstream's forward runs, in order.

        Upstream runs ``layers[: config.num_hidden_layers]`` and reads the count at every forward:
        a model whose count has been lowered keeps its other layers and does not run them.
        """
        stack = self.stack
        return list(stack.layers[: stack.config.num_hidden_layers])

    @property
    def num_layers(self) -> int:
        """How many layers upstream's forward runs."""
        stack = self.stack
        return len(range(len(stack.layers))[: stack.config.num_hidden_layers])

    @property
    def read_anew(self) -> tuple[object, ...]:
        """What upstream's forward reads each time, beside weights, and so can change under a patch.

        That is the count of layers, the config's sliding window, and each attention's own window
        and factor on the logits.
        """
        read: list[object] = [self.num_layers, getattr(self.config, "sliding_window", None)]
        for layer in self.layers:
            attention = getattr(layer, "self_attn", None)
            read += [getattr(attention, name, None) for name in ("scaling", "sliding_window")]
        return tuple(read)

    @property
    def rotary(self) -> Any:
        """The module that makes cosines and sines."""
        return self.stack.rotary_emb

    @property
    def head(self) -> nn.Module | None:
        """The language-model head; None if the model has none."""
        head: nn.Module | None = self._model.get_output_embeddings()
        return head

    def embed(self, token_ids: Tensor) -> Tensor:
        """Compute what the first layer is given.

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
    """Find the decoder stack; where it lies is the same for all models of a class."""
    kind = type(model)
    path = _paths.get(kind)
    if path is None:
        # What only passes for a model has perhaps the older name.
        found = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        if "forward" not in vars(kind):  # a wrapper around models of any class
            return found
        path = next((path for path, module in model.named_modules() if module is found), None)
        if path is None:
            return found
        _paths[kind] = path
    return model.get_submodule(path)
