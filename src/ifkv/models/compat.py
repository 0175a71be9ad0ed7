"""Names that differ between releases of transformers."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn


def cache_keyword(module: nn.Module, cache: Any) -> dict[str, Any]:
    """A cache as the keyword by which a module's forward takes it.

    ``cache`` from transformers 5.24 on, ``past_key_values`` before; a model's ``generate()`` takes
    what its forward does. The older name still works there for a while, with a warning a call.

    Args:
        module: A model, a decoder layer or an attention module; perhaps a subclass or a wrapper
            whose forward hands on whatever it is given.
        cache: The cache, or what stands in for one.
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
    # No forward says so: by what transformers' own models take.
    from transformers.models.llama.modeling_llama import LlamaAttention

    fallback: Any = LlamaAttention
    return _cache_name(fallback)
