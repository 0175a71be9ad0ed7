"""Names that differ between releases of transformers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def cache_keyword(module: nn.Module, cache: Any) -> dict[str, Any]:
    """A cache as the keyword by which a module's forward takes it.

    ``cache`` from transformers 5.24 on, ``past_key_values`` before; a model's ``generate()`` takes
    what its forward does. The older name still works there for a while, with a warning a call.

    Args:
        module: A model, a decoder layer or an attention module.
        cache: The cache, or what stands in for one.
    """
    kind: Any = type(module)
    return {_cache_name(kind.forward): cache}


@functools.cache
def _cache_name(forward: Callable[..., Any]) -> str:
    names = inspect.signature(forward).parameters
    return "cache" if "cache" in names else "past_key_values"
