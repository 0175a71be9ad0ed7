"""Options of selectors: typed fields of a dataclass, checked, read from text and written."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ifkv.errors import InvalidInputError
from ifkv.steps.scoring_layers import DEFAULT_DEPTH, chosen_layers, layers_between
from ifkv.utils.checks import whole_numbers


@dataclasses.dataclass(frozen=True)
class Layers:
    """Layers that score: a range of the model's depth, or layers by number.

    Attributes:
        depth: Start and end as shares of the depth, between 0 and 1.
        numbers: Layers by number instead, negative ones counted from the end.

    >>> str(Layers.of("0.5-1.0")), Layers.of("0.5-1.0").within(4)
    ('0.5-1.0', [2, 3])
    >>> str(Layers.of([-2, -1])), Layers.of("-2+-1").within(4)
    ('-2+-1', [2, 3])
    """

    depth: tuple[float, float] = DEFAULT_DEPTH
    numbers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        start, stop = self.depth
        if not 0 <= start < stop <= 1:
            raise InvalidInputError(
                f"layers is {start}-{stop}, but a range of the depth starts and ends between 0 and "
                "1, and ends behind its start."
            )

    @classmethod
    def of(cls, value: Any) -> Layers:
        """Read layers from a string (``"0.55-0.70"``, ``"22+23"``), numbers, or a `Layers`."""
        if isinstance(value, Layers):
            return value
        if not isinstance(value, str):
            return cls(numbers=tuple(whole_numbers(value, "layers")))
        span = re.fullmatch(r"(\d*\.?\d+)-(\d*\.?\d+)", value)
        if span:
            return cls(depth=(float(span[1]), float(span[2])))
        if re.fullmatch(r"-?\d+(\+-?\d+)*", value):
            return cls(numbers=tuple(int(part) for part in value.split("+")))
        raise InvalidInputError(
            f"layers is {value!r}; write a range of the depth, such as 0.55-0.70, or layers by "
            "number, such as 22+23 or -2+-1."
        )

    def within(self, depth: int) -> list[int]:
        """Return the layers of a model with ``depth`` layers, ascending.

        Raises:
            InvalidInputError: The model does not have a layer of this number.
        """
        if self.numbers is not None:
            return chosen_layers(depth, self.numbers)
        return layers_between(*self.depth, depth)

    def __str__(self) -> str:
        if self.numbers is not None:
            return "+".join(map(str, self.numbers))
        return f"{self.depth[0]}-{self.depth[1]}"


DEFAULT_LAYERS = Layers()
ALL_LAYERS = Layers(depth=(0.0, 1.0))


def check_options(selector: Any) -> None:
    """Convert a dataclass's fields to their types, in place; text is parsed.

    Raises:
        InvalidInputError: A field cannot have its value.
    """
    if not dataclasses.is_dataclass(selector):
        return
    cls: Any = type(selector)
    for field, hint in _hints(cls).items():
        what = f"{cls.name}'s option {field}"
        object.__setattr__(selector, field, _converted(getattr(selector, field), hint, what))


def options_from_text(cls: type[Any], text: str) -> dict[str, str]:
    """Split the options ``a=1,b=2`` of a selector class, without converting values.

    Raises:
        InvalidInputError: The class has no such option, an option is given twice, or ``=`` is
            missing.
    """
    known = _hints(cls) if dataclasses.is_dataclass(cls) else {}
    options: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise InvalidInputError(
                f"{part!r} is no option of selector {cls.name}; write name=value, separated by "
                "commas."
            )
        if name not in known:
            raise InvalidInputError(
                f"selector {cls.name} has no option {name!r}; it has {', '.join(known) or 'none'}."
            )
        if name in options:
            raise InvalidInputError(f"option {name} of selector {cls.name} is given twice.")
        options[name] = value
    return options


def spec_of(selector: Any) -> str:
    """Return the shortest string that makes this selector: its name and changed options."""
    name: str = selector.name
    if not dataclasses.is_dataclass(selector):
        return name
    cls: Any = type(selector)
    default = cls()
    given = [
        f"{field}={_text(getattr(selector, field))}"
        for field in _hints(cls)
        if getattr(selector, field) != getattr(default, field)
    ]
    return ":".join([name, ",".join(given)]) if given else name


def describe(cls: type[Any]) -> dict[str, str]:
    """Describe the options of a selector class in words: the values each may have.

    >>> from ifkv.selectors import Random
    >>> describe(Random)
    {'seed': 'a whole number, 0 by default'}
    """
    if not dataclasses.is_dataclass(cls):
        return {}
    default: Any = cls()
    return {
        field: f"{_kind(hint)}, {_text(getattr(default, field))} by default"
        for field, hint in _hints(cls).items()
    }


def _hints(cls: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _kind(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    names: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(hint, "a range of the depth, such as 0.55-0.70, or layers, such as 22+23")


def _converted(value: Any, hint: Any, what: str) -> Any:
    if hint is Layers:
        return Layers.of(value)
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
    elif hint is bool:
        if isinstance(value, bool) or value in ("true", "false"):
            return value in (True, "true")
    elif hint in (int, float):
        kinds: Sequence[type] = (str, int) if hint is int else (str, int, float)
        if isinstance(value, tuple(kinds)) and not isinstance(value, bool):
            try:
                number = hint(value)
            except ValueError:
                number = math.nan
            if math.isfinite(number):
                return number
    else:
        return value  # another type, which checks itself
    raise InvalidInputError(f"{what} is {value!r}, but must be {_kind(hint)}.")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
