"""Overlay: a config that always equals another one, except for the name of its attention.

An overlay shares its ``__dict__`` with the config below, so a change of either is a change of both.
A model that was built from an overlay keeps it after the patch is undone. The overlay is then
*lifted*: it names the same attention as the config below.
"""

from __future__ import annotations

import copy
import operator
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

# Where transformers keeps and looks up the name of a model's attention.
_NAMED = ("_attn_implementation", "_attn_implementation_internal")


def overlay(config: PreTrainedConfig, name: str, active: Callable[[], bool]) -> PreTrainedConfig:
    """Make an overlay over a config.

    Args:
        config: The config to cover.
        name: Name of the attention that the overlay gives.
        active: Returns True until the overlay is lifted.
    """
    base = type(config)
    stored = cast(property, base._attn_implementation)  # transformers reads this property

    def attention_name(self: Any) -> Any:
        assert stored.fget is not None
        return name if active() else stored.fget(self)

    def set_attribute(self: Any, key: str, value: object) -> None:
        # A model built from the overlay writes the name back that it has read. In the config below,
        # the attention would then delegate to itself.
        if key not in _NAMED or value != name:
            base.__setattr__(self, key, value)

    assert stored.fset is not None
    overlaid = type(
        base.__name__,
        (base,),
        {
            "_ifkv_below": config,
            "_attn_implementation": property(attention_name, stored.fset),
            "__setattr__": set_attribute,
            # Copies and pickles are made of the config below, which the model's head shares.
            # Calling the class makes an ordinary config.
            "__new__": lambda _, *args, **kwargs: base(*args, **kwargs),
            "__copy__": lambda _: copy.copy(config),
            "__reduce_ex__": lambda *_: (operator.itemgetter(0), ((config,),)),
        },
    )
    laid: Any = object.__new__(overlaid)
    object.__setattr__(laid, "__dict__", config.__dict__)
    return cast("PreTrainedConfig", laid)


def below(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config below an overlay; return any other config unchanged."""
    found: PreTrainedConfig = getattr(type(config), "_ifkv_below", config)
    return found
