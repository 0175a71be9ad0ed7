"""Costs, and the sizes of a model that they depend on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ifkv.errors import InvalidInputError
from ifkv.models.decoder import DecoderView
from ifkv.models.experts import experts_of
from ifkv.models.families import resolve_family

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations and bytes; costs can be added, and multiplied by a number.

    Attributes:
        flops: Floating-point operations.
        bytes: Bytes of weights, keys and values read or written.

    >>> Cost(2.0, 1.0) + 2 * Cost(1.0)
    Cost(flops=4.0, bytes=1.0)
    """

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.bytes * times)

    __rmul__ = __mul__


NO_COST = Cost()


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, read from the modules of one decoder layer.

    Attributes:
        layer_parameters: Elements of the layer's weight matrices that a row is multiplied by: with
            experts, those that a row uses. The mean over the layers if some have no experts.
        attention_width: Query heads times head_dim.
        num_layers: Decoder layers.
        attention_parameters: Elements of the matrices of its attention block.
        kv_width: Key heads times head_dim: elements of one row's keys.
        element_size: Bytes of an element in the model's dtype, the dtype of keys and values.
            Quantized weights are counted at this size too.
        hidden_size: Width of the hidden states.
        head_dim: Elements of one head.
        vocabulary: Rows of the output embedding.
        windows: Sliding window of each layer, None for a layer without one; empty if none has one.
        expert_parameters: Elements of one expert, the mean over the layers; 0 without experts.
        experts: Experts of a layer.
        experts_used: Experts that a row goes to.

    >>> from ifkv.testing import tiny_model
    >>> shape = ModelShape.of(tiny_model("qwen3", num_heads=4, num_kv_heads=2, head_dim=8))
    >>> shape.heads, shape.kv_heads, shape.attention_width
    (4, 2, 32)
    """

    layer_parameters: int
    attention_width: int
    num_layers: int
    attention_parameters: int = 0
    kv_width: int = 0
    element_size: int = 0
    hidden_size: int = 0
    head_dim: int = 0
    vocabulary: int = 0
    windows: tuple[int | None, ...] = ()
    expert_parameters: int = 0
    experts: int = 0
    experts_used: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelShape:
        """Read the shape of a model from its first layer, which stands for all but the windows.

        Only shapes are read, so the model may be on the ``meta`` device.
        """
        view = DecoderView(model)
        layers = view.layers
        layer = layers[0]
        matrices, attention = _elements(layer), _elements(layer.self_attn)
        # o_proj takes the outputs of all heads, whatever the projections before it. What those
        # give beside the queries is keys and values.
        hidden, width = _sizes(layer.self_attn.o_proj)
        kv_width = (attention // hidden - 2 * width) // 2
        windows = view.windows
        routed = [experts_of(each, view.config) for each in layers]
        found = [experts for experts in routed if experts is not None]
        if found:
            used = sum(each.used * each.parameters for each in found)
            matrices = (sum(map(_elements, layers)) + used) // len(layers)
        return cls(
            layer_parameters=matrices,
            attention_width=width,
            num_layers=len(layers),
            attention_parameters=attention,
            kv_width=kv_width,
            element_size=model.dtype.itemsize,
            hidden_size=hidden,
            head_dim=layer.self_attn.head_dim,
            vocabulary=_sizes(view.head)[0],
            windows=windows if any(windows) else (),
            expert_parameters=sum(each.parameters for each in found) // len(layers),
            experts=found[0].number if found else 0,
            experts_used=found[0].used if found else 0,
        )

    @classmethod
    def of_config(cls, config: PreTrainedConfig, dtype: torch.dtype) -> ModelShape:
        """Read the shape of the model that a config describes; no weights are made.

        Args:
            config: The config of a causal language model.
            dtype: The dtype that the model is going to have.

        Raises:
            InvalidInputError: The config is not that of a causal language model.
            UnsupportedModelError: Its family is not supported.
        """
        import torch
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise InvalidInputError(
                f"no plan can be made for a {config.model_type!r} model: {reason}"
            ) from error
        resolve_family(model)
        return cls.of(model)

    @property
    def heads(self) -> int:
        """Return the number of query heads."""
        return self.attention_width // self.head_dim

    @property
    def kv_heads(self) -> int:
        """Return the number of key heads."""
        return self.kv_width // self.head_dim

    def product(self, parameters: int, rows: int) -> Cost:
        """Return the cost of rows through matrices with this number of elements in all."""
        return Cost(2.0 * parameters * rows, float(parameters * self.element_size))

    def attention(self, pairs: float, keys: int) -> Cost:
        """Return the cost of attention over pairs of a row and a key, keys and values read."""
        return Cost(4.0 * self.attention_width * pairs, 2.0 * keys * self.row_bytes)

    def layer(self, rows: int, pairs: float, keys: int) -> Cost:
        """Return the cost of rows through one whole decoder layer."""
        # One row reads the experts that it uses; other rows may go to others, up to all there are.
        further = max(0, min(self.experts, rows * self.experts_used) - self.experts_used)
        read = Cost(bytes=float(further * self.expert_parameters * self.element_size))
        return self.product(self.layer_parameters, rows) + read + self.attention(pairs, keys)

    @property
    def held_parameters(self) -> int:
        """Return the elements of a layer's weight matrices, with all of its experts."""
        return self.layer_parameters + (self.experts - self.experts_used) * self.expert_parameters

    def pairs(self, count_in: Callable[[int | None], float], layers: int | None = None) -> float:
        """Add up the pairs of a row and a key over layers.

        Args:
            count_in: Counts the pairs of one layer; its argument is the layer's window.
            layers: Number of layers, from the first; all if None.
        """
        if not self.windows:
            return count_in(None) * (self.num_layers if layers is None else layers)
        return sum(map(count_in, self.windows[:layers]))

    def layers(
        self,
        rows: int,
        count_in: Callable[[int | None], float],
        keys: int,
        layers: int | None = None,
    ) -> Cost:
        """Return the cost of rows through whole decoder layers; `pairs` explains the arguments."""
        number = self.num_layers if layers is None else layers
        attention = self.attention(self.pairs(count_in, layers), 0)
        return number * self.layer(rows, 0, keys) + attention

    def window(self, layer_idx: int) -> int | None:
        """Return the sliding window of a layer; None if it has none."""
        return self.windows[layer_idx] if self.windows else None

    def head(self) -> Cost:
        """Return the cost of the logits of one row."""
        return self.product(self.vocabulary * self.hidden_size, 1)

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row's keys, or of its values, in one layer."""
        return self.kv_width * self.element_size

    @property
    def token_bytes(self) -> int:
        """Return the bytes of one token's keys and values in all layers, as a store keeps them."""
        return 2 * self.num_layers * self.row_bytes


def _elements(module: Any) -> int:
    """Count the elements of the weight matrices in a module."""
    total = 0
    for part in module.modules():
        if hasattr(part, "out_features") and getattr(part, "groups", None) is None:
            out, width = _sizes(part)
            total += out * width
        else:
            total += sum(p.numel() for p in part.parameters(recurse=False) if p.ndim == 2)
    return total


def _sizes(linear: Any) -> tuple[int, int]:
    """Return the numbers of outputs and inputs of a projection.

    A quantized projection knows both, but its weights may have other shapes.
    """
    if hasattr(linear, "out_features"):
        return linear.out_features, linear.in_features
    out, width = linear.weight.shape
    return out, width
