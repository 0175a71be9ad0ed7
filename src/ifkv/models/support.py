"""Refuse models that ifkv's own passes do not support, before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from ifkv.errors import UnsupportedModelError
from ifkv.models.decoder import DecoderView
from ifkv.models.hooks import check_classes, check_hooks
from ifkv.models.wrappers import wrapper_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.models.families import Family


def check_structure(model: PreTrainedModel, family: Family) -> None:
    """Raise if the modules of a model are not those of its family file.

    Raises:
        UnsupportedModelError: The model has no language-model head, wraps another model in a way
            that no wrapper file covers, or overrides upstream's forward; or its decoder stack lacks
            a part or has another attention.
    """
    name = type(model).__name__
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "base_model"):
        raise UnsupportedModelError(
            f"{name} is no model of transformers itself; patch the one that it wraps."
        )
    view = DecoderView(model)
    if view.head is None or view.stack is model:
        raise UnsupportedModelError(
            f"{name} has no language-model head; patch the causal language model "
            "(…ForCausalLM) that holds it."
        )
    check_classes(model)
    wrapper_of(model)
    base: Any = view.stack
    attention = family.attention_class.rpartition(".")[2]
    for part in ("embed_tokens", "layers", "norm", "rotary_emb"):
        if not hasattr(base, part):
            raise UnsupportedModelError(
                f"{type(base).__name__} has no {part!r}, which family {family.name!r} expects "
                f"of {family.model_class}. If {name} wraps a model, patch that one, with adapters "
                "merged into it; otherwise this transformers release may have moved it."
            )
    layers = view.layers
    if not layers:
        raise UnsupportedModelError(
            f"config.num_hidden_layers is {base.config.num_hidden_layers} and {name} holds "
            f"{len(base.layers)} layers, so no layer runs; correct the config."
        )
    for index, layer in enumerate(layers):
        found = type(getattr(layer, "self_attn", None)).__name__
        if found != attention:
            raise UnsupportedModelError(
                f"layer {index} has attention {found}, but family {family.name!r} expects "
                f"{attention}; ifkv does not approximate an architecture it does not know."
            )
        own = cast(Any, layer).self_attn.layer_idx
        if own != index:
            raise UnsupportedModelError(
                f"layer {index} of this {name} says that it is layer_idx {own}, so its keys and "
                f"values would go where another layer's belong; set self_attn.layer_idx = {index} "
                "there (layers that were removed leave the others misnumbered)."
            )


def check_weights(model: PreTrainedModel) -> None:
    """Raise if some weights are not on the device or cannot be read.

    Raises:
        UnsupportedModelError: The weights are on several devices, offloaded, split between
            processes, or not among the parameters and buffers.
    """
    name = type(model).__name__
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if "meta" in devices:
        raise UnsupportedModelError(
            f"some weights of this {name} are not in memory (device 'meta'): offloaded, or never "
            "loaded. Load all of it onto one device: from_pretrained(...).to('cuda'), for example."
        )
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"this {name} is spread over {', '.join(devices)}, but a request's cache lies on one "
            "device. Load all of it onto one: from_pretrained(...).to('cuda'), for example."
        )
    sharded = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    if sharded or (getattr(model, "_tp_size", None) or 1) > 1:
        raise UnsupportedModelError(
            f"this {name} is split between processes, each of which would choose tokens by its own "
            "heads alone. Load it without tp_plan, tp_size or another way of sharding."
        )
    computing: Any = DecoderView(model).stack if wrapper_of(model) is None else model
    for path, module in computing.named_modules():
        if hasattr(module, "out_features") and not [*module.parameters(), *module.buffers()]:
            raise UnsupportedModelError(
                f"{path} of this {name} is a {type(module).__name__} whose weights cannot be read, "
                "so stored documents could not be told from another model's. Quantize its weights "
                "in another way."
            )


def check_mode(model: PreTrainedModel) -> None:
    """Raise if a model's state, beside its weights, changes what it computes; checked every call.

    Raises:
        UnsupportedModelError: The model is in training mode, carries adapters or hooks, or runs
            under ``torch.autocast``.
    """
    if model.training:
        raise UnsupportedModelError(
            f"this {type(model).__name__} is in training mode, in which dropout and gradient "
            "checkpointing change what a cache holds; call model.eval() first."
        )
    # peft sets the first and removes it when adapters are merged; transformers sets the second.
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"this {type(model).__name__} carries adapters, which can be switched without a weight "
            "changing, so stored documents could not be told apart. Merge them into the weights "
            "(peft: merge_and_unload()) and patch the merged model."
        )
    check_hooks(model)
    kind = model.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != model.dtype:
        raise UnsupportedModelError(
            f"torch.autocast to {torch.get_autocast_dtype(kind)} is on, but this "
            f"{type(model).__name__} and its caches are {model.dtype}; leave the autocast block, "
            "or load the model in that dtype."
        )
