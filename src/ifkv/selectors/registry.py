"""The registry of selectors by name."""

from __future__ import annotations

import re
from typing import TypeVar

from ifkv.errors import InvalidInputError
from ifkv.selectors.options import options_from_text
from ifkv.selectors.protocol import Selector

# The selector that is used if the caller names none.
DEFAULT_SELECTOR = "sink-aware"

_REGISTRY: dict[str, type[Selector]] = {}
S = TypeVar("S", bound=type[Selector])


def register(cls: S) -> S:
    """Register a selector by its name; a decorator for your own classes.

    Raises:
        InvalidInputError: It is no selector class, its name is missing, malformed or taken, or an
            option has no default.
    """
    if not isinstance(cls, type) or not issubclass(cls, Selector):
        raise InvalidInputError(f"{cls!r} is no selector; derive a class from Selector or Ranked.")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise InvalidInputError(
            f"{cls.__name__}.name is {name!r}; give it a name of lower-case letters, digits and "
            "hyphens."
        )
    if not isinstance(getattr(cls, "paper", None), str):
        raise InvalidInputError(
            f"{cls.__name__}.paper is missing; say where the rule comes from, or 'unpublished'."
        )
    taken = _REGISTRY.get(name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise InvalidInputError(f"the name {name!r} is taken by {taken.__qualname__}; use another.")
    try:
        cls()
    except TypeError as error:
        raise InvalidInputError(
            f"{cls.__name__} cannot be made without arguments ({error}); implement its methods, "
            "and give each option a default."
        ) from error
    _REGISTRY[name] = cls
    return cls


def names() -> list[str]:
    """Return the names of all selectors, in alphabetical order.

    >>> "attention-norm" in names()
    True
    """
    return sorted(_REGISTRY)


def selector_class(name: str) -> type[Selector]:
    """Return the selector class of a name.

    Raises:
        InvalidInputError: There is none.
    """
    if name not in _REGISTRY:
        raise InvalidInputError(
            f"there is no selector {name!r}; choose one of {', '.join(names())}."
        )
    return _REGISTRY[name]


def resolve(spec: str | Selector) -> Selector:
    """Return the selector that a string names, with its options; a selector is returned as given.

    Args:
        spec: ``"name"`` or ``"name:option=value,option=value"``.

    Raises:
        InvalidInputError: An unknown name or option, or a value an option cannot have.

    >>> print(resolve("attention-norm:query=prompt,reduction=sum"))
    attention-norm:reduction=sum
    """
    if isinstance(spec, Selector):
        return spec
    if not isinstance(spec, str):
        raise InvalidInputError(
            f"a selector is a {type(spec).__name__}; give a name, such as 'sink-aware', or a "
            "selector."
        )
    name, colon, text = spec.partition(":")
    cls = selector_class(name.strip())
    return cls(**options_from_text(cls, text)) if colon else cls()
