"""A config that equals another in everything, now and later, but for its attention's name.

An overlay shares its ``__dict__`` with the config it covers: changes made through either are seen
through both. It may outlive the patch it was made for, in a model that somebody has built from it:
once it is *lifted* it says what the config below says.
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
    """Lay an overlay over a config.

    Args:
        config: The config to cover.
        name: What the overlay says that the attention is called.
        active: Whether it still does; once not, the overlay is lifted.
    """
    base = type(config)
    stored = cast(property, base._attn_implementation)  # what transformers reads

    def attention_name(self: Any) -> Any:
        assert stored.fget is not None
        return name if active() else stored.fget(self)

    def set_attribute(self: Any, key: str, value: object) -> None:
        # A model built from the overlay writes back what it has read from it. Written through, the
        # attention below would be this one, which asks for the one below.
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
            # Copies and pickles are of the config below, which the model's head shares, and what is
            # made by calling the class is an ordinary config.
            "__new__": lambda _, *args, **kwargs: base(*args, **kwargs),
            "__copy__": lambda _: copy.copy(config),
            "__reduce_ex__": lambda *_: (operator.itemgetter(0), ((config,),)),
        },
    )
    laid: Any = object.__new__(overlaid)
    object.__setattr__(laid, "__dict__", config.__dict__)
    return cast("PreTrainedConfig", laid)


def below(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config that an overlay covers; one that is no overlay is returned as it is."""
    found: PreTrainedConfig = getattr(type(config), "_ifkv_below", config)
    return found
