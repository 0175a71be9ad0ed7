"""Files of facts: TOML with exactly the keys of a dataclass, each of the right kind."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ifkv.errors import UnsupportedModelError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


def patches() -> Traversable:
    """Return the folder of family files: in the installed package, or at a checkout's root."""
    installed = resources.files("ifkv") / "patches"
    if installed.is_dir():
        return installed
    return Path(__file__).resolve().parents[3] / "patches"


def parse_facts(
    text: str, kind: type[Any], name: str, choices: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Validate the text of one file of facts.

    Args:
        text: TOML.
        kind: The dataclass whose fields, without ``name``, are the keys.
        name: The file's path below ``patches/``, without its ending.
        choices: The values allowed for some keys; of a table, the keys in it.

    Returns:
        The fields, without ``name``.

    Raises:
        UnsupportedModelError: The text is not TOML; or a key is unknown, missing, or has a value
            of the wrong type.
    """
    try:
        found: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UnsupportedModelError(f"patches/{name}.toml is not TOML: {error}.") from error
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name != "name"}
    if unknown := sorted(set(found) - set(fields)):
        raise UnsupportedModelError(
            f"patches/{name}.toml has the unknown key {unknown[0]!r}; "
            f"known keys are {', '.join(fields)}. Remove it or correct its spelling."
        )
    if missing := sorted(set(fields) - set(found)):
        raise UnsupportedModelError(
            f"patches/{name}.toml lacks the key {missing[0]!r}. Every key of patches/README.md "
            "must be stated: a family is facts, and none has a default."
        )
    values: dict[str, Any] = {}
    for key, field in fields.items():
        value = found[key]
        wanted = str(field.type)
        ok = {
            "str": isinstance(value, str),
            "bool": isinstance(value, bool),
            "int": isinstance(value, int) and not isinstance(value, bool),
            "tuple[str, ...]": _are_strings(value),
            "dict[str, str]": isinstance(value, dict) and _are_strings([*value.values()]),
            "dict[str, tuple[str, ...]]": isinstance(value, dict)
            and all(_are_strings(v) for v in value.values()),
        }[wanted]
        given = value if isinstance(value, dict) else [value]
        if not ok or (key in choices and not set(given) <= set(choices[key])):
            rule = f"one of {choices[key]}" if key in choices else wanted
            if key in choices and wanted.startswith("dict"):
                rule = f"a table of paths, its keys among {', '.join(choices[key])}"
            raise UnsupportedModelError(
                f"patches/{name}.toml: {key} is {value!r} but must be {rule}."
            )
        if wanted.startswith("tuple"):
            value = tuple(value)
        elif wanted == "dict[str, tuple[str, ...]]":
            value = {path: tuple(hashes) for path, hashes in value.items()}
        values[key] = value
    return values


def check_read(paths: tuple[str, ...], hashes: Mapping[str, Any], name: str) -> None:
    """Raise if upstream code that ifkv relies on has no hash.

    Raises:
        UnsupportedModelError: A path has none.
    """
    if unread := sorted(set(paths) - set(hashes)):
        raise UnsupportedModelError(
            f"patches/{name}.toml: upstream_hashes lacks {unread[0]}; read that code and state its "
            "hash (ifkv.models.source_hash)."
        )


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)
