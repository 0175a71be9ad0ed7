"""Attention and mask functions that are registered with transformers.

They run ifkv's own passes (`ifkv.forward.passes`) and decoding steps over stitched caches. Every
other call goes to the attention that the model used before the patch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ifkv.backends.fp8 import dequantize
from ifkv.backends.plans import UNSCALED, is_stitched, scales_of
from ifkv.errors import UnsupportedModelError
from ifkv.forward.passes import LayerCall
from ifkv.models.decoder import window_of
from ifkv.models.upstream_code import attention_function
from ifkv.patching.attention_keywords import checked_spec, spec_of, strange_keywords

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

    from ifkv.backends.base import Backend
    from ifkv.backends.spec import AttentionSpec
    from ifkv.forward.passes import AttentionPass

Attention = Callable[..., "tuple[Tensor, Tensor | None]"]


def register(
    name: str,
    config: PreTrainedConfig,
    backend: Backend | None = None,
    window_rule: str = "none",
) -> None:
    """Register the attention and mask functions of one patched model.

    Args:
        name: The name to register them under.
        config: The config below the overlay. It names the attention to delegate to, and is read at
            every call, so that ``set_attn_implementation`` works while the model is patched.
        backend: Backend for decoding steps over stitched caches.
        window_rule: The family's ``sliding_window``.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        current: AttentionPass | None = kwargs.pop("ifkv_pass", None)
        if current is not None:
            layer_idx: Any = module.layer_idx
            window = window_of(window_rule, config, layer_idx)
            spec = checked_spec(module, attention_mask, kwargs, window)
            if backend is not None:
                backend.check_spec(spec)
            return current.attend(LayerCall(layer_idx, query, key, value, spec)), None
        scales = scales_of(key)
        decoding = _spec_of_decoding(query, key, attention_mask, kwargs)
        if backend is not None and decoding is not None and backend.supports(decoding):
            decoded = backend.decode(query, key, value, decoding, scales=scales or UNSCALED)
            if decoded is not None:
                return decoded, None
        if scales is not None:  # the model's own attention cannot read 8-bit keys
            key = dequantize(key, scales.keys, query.dtype)
            value = dequantize(value, scales.values, query.dtype)
        implementation = config._attn_implementation
        eager: Any = None
        if implementation in (None, "eager"):  # lives in each modeling file, not in the registry
            eager = attention_function(module, "eager_attention_forward")
        if eager is None and implementation == "eager":
            raise UnsupportedModelError(
                f"{type(module).__name__} calls no eager_attention_forward, so "
                "ifkv cannot hand its attention back to it; unpatch the model, or take "
                "attn_implementation='sdpa'."
            )
        usual: Attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        return usual(module, query, key, value, attention_mask, **kwargs)

    def mask(*args: Any, **kwargs: Any) -> Any:
        # transformers too gives None to an attention without a registered mask function.
        usual = ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation)
        return None if usual is None else usual(*args, **kwargs)

    AttentionInterface.register(name, attention)
    # Without this second registration transformers would silently drop every padding mask.
    AttentionMaskInterface.register(name, mask)


def _spec_of_decoding(
    query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> AttentionSpec | None:
    """Return the spec if this is one row per sequence that sees all of a stitched cache.

    Without a mask there is no padding: transformers omits a mask only if it hides nothing. With an
    unknown keyword the call goes to the model's own attention, which knows it.
    """
    if mask is not None or query.shape[2] != 1 or not is_stitched(key):
        return None
    spec = None if strange_keywords(kwargs) else spec_of(kwargs)
    if spec is None or (spec.window is not None and key.shape[2] > spec.window):
        return None
    return dataclasses.replace(spec, window=None)


def unregister(name: str) -> None:
    """Remove the functions that `register` registered."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface._global_mapping.pop(name, None)  # there is no public way
    AttentionMaskInterface._global_mapping.pop(name, None)
