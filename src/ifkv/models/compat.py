"""Names that differ between releases of transformers."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn


def cache_keyword(module: nn.Module, cache: Any) -> dict[str, Any]:
    """Return a cache as the keyword argument that a module's forward takes.

    The keyword is ``cache`` from transformers 5.24 on and ``past_key_values`` before. A model's
    ``generate()`` takes the same keyword as its forward. Newer releases still accept the older
    name, with a warning at every call.

    Args:
        module: A model, a decoder layer or an attention module. It may be a subclass or a wrapper
            whose forward passes its keywords on.
        cache: The cache, or an object in its place.

    Returns:
        The keyword and the cache.
    """
    kind: Any = type(module)
    return {_cache_name(kind): cache}


@functools.cache
def _cache_name(kind: type[nn.Module]) -> str:
    for each in kind.__mro__:
        forward = vars(each).get("forward")
        names = inspect.signature(forward).parameters if callable(forward) else {}
        for name in ("cache", "past_key_values"):
            if name in names:
                return name
    # No forward names it: take the keyword of transformers' own models.
    from transformers.models.llama.modeling_llama import LlamaAttention

    fallback: Any = LlamaAttention
    return _cache_name(fallback)
