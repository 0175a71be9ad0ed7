"""Decoder stack, layers, embedding and head of a model: the parts that ifkv runs itself."""

from __future__ import annotations

import operator
import weakref
from typing import TYPE_CHECKING, Any

import torch

from ifkv.models.families import resolve_family

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from ifkv.models.families import Family

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
        window, the sliding window and scaling of each attention, and, where there are such, the
        multipliers of embeddings and residual branches and the softcap of each attention.
        """
        stack = self.stack
        read: list[object] = [self.num_layers, getattr(self.config, "sliding_window", None)]
        read += _present(stack, "embedding_multiplier")
        for layer in self.layers:
            attention = getattr(layer, "self_attn", None)
            read += [getattr(attention, name, None) for name in ("scaling", "sliding_window")]
            read += _present(layer, "residual_multiplier")
            read += _present(attention, "attn_logit_softcapping")
        return tuple(read)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Return the sliding window of each layer; None for a layer without one."""
        rule = self._family.sliding_window
        return tuple(window_of(rule, self.config, index) for index in range(self.num_layers))

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
        multiplier = self._scalar("embeddings_multiplied_by")
        return hidden if multiplier is None else hidden * multiplier

    def attention_input(self, layer: Any, hidden: Tensor) -> Tensor:
        """Compute what the attention of a layer reads.

        Args:
            layer: A layer of this model.
            hidden: Input of the layer, ``[1, rows, hidden]``.

        Returns:
            ``[1, rows, hidden]``: the input itself in families whose norm comes behind the
            attention.
        """
        norm = self._family.attention_norm
        read: Tensor = hidden if norm == "none" else getattr(layer, norm)(hidden)
        return read

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of every row.

        Args:
            hidden: Output of the last layer, ``[1, rows, hidden]``.

        Returns:
            ``[rows, vocabulary]``.
        """
        head: Any = self.head
        logits: Tensor = head(self.stack.norm(hidden))
        # The same operations in the same order as upstream's, for equal bits.
        if (factor := self._scalar("logits_multiplied_by")) is not None:
            logits = logits * factor
        if (divisor := self._scalar("logits_divided_by")) is not None:
            logits = logits / divisor
        if (cap := self._scalar("logits_capped_by")) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits[0]

    @property
    def _family(self) -> Family:
        return resolve_family(self._model)

    def _scalar(self, name: str) -> float | None:
        """Return a number that the family's ``scalars`` name; None if it is absent or None."""
        path = self._family.scalars.get(name)
        number: float | None = None if path is None else operator.attrgetter(path)(self._model)
        return number


def window_of(rule: str, config: Any, layer_idx: int) -> int | None:
    """Return the sliding window of a layer by its family's rule, as upstream's masks have it.

    Args:
        rule: The family's ``sliding_window``.
        config: Config of the decoder stack.
        layer_idx: Index of the layer.
    """
    if rule == "none":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    if rule == "layer-types" and config.layer_types[layer_idx] != "sliding_attention":
        return None
    return window


def _present(module: object, name: str) -> list[object]:
    return [getattr(module, name)] if hasattr(module, name) else []


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
