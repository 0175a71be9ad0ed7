"""Checks of the files in a model's folder, before any weights are read.

Broken downloads, clones without Git LFS and full disks leave damaged files. They are found here,
where they can be named, and not while weights are loaded. The headers of safetensors files hold
names, shapes and dtypes of the weights, so the memory that loading takes is known too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_POINTER = b"version https://git-lfs"
_AGAIN = "fetch the model again, or give another folder"
# In transformers' order of preference.
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OLD, _OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_NAMED = 3


@dataclass(frozen=True)
class Weights:
    """Weights of a checkpoint, as its headers describe them.

    Attributes:
        numbers: Count of numbers by dtype, under the names of safetensors.
        quantized: True if they keep their dtype, whatever dtype is asked for.
    """

    numbers: dict[str, int]
    quantized: bool

    def nbytes(self, dtype: str) -> int:
        """Return the bytes that the weights take once they are loaded.

        Args:
            dtype: Dtype they are loaded in; one of `DTYPES`.
        """
        wide = _bits(dtype)
        return sum(
            number * (wide if kind in _FLOATS and not self.quantized else _bits(kind)) // 8
            for kind, number in self.numbers.items()
        )


def check_files(folder: Path) -> None:
    """Refuse a folder whose files are not what their names say.

    Raises:
        InvalidInputError: A file is a pointer of Git LFS, or a JSON file holds no JSON.
    """
    pointers = [file.name for file in sorted(folder.iterdir()) if _is_pointer(file)]
    if pointers:
        raise InvalidInputError(
            f"in the folder {str(folder)!r}, {_listed(pointers)} only stands for content that Git "
            "LFS keeps elsewhere; fetch it there with git lfs pull."
        )
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith("config.json"):
            read_json(file)


def weights_of(folder: Path, config: PretrainedConfig) -> Weights | None:
    """Return a checkpoint's weights; None if its files do not describe them, as older formats.

    Raises:
        InvalidInputError: There is no checkpoint, or a part of it is missing or damaged.
    """
    files = _weight_files(folder, config)
    for file in files:
        _check_there(file)
    if not all(file.suffix == ".safetensors" for file in files):
        return None
    numbers: dict[str, int] = {}
    for file in files:
        for name, kind, number in _header(file):
            if name == "lm_head.weight" and getattr(config, "tie_word_embeddings", False):
                continue  # the embeddings once more
            numbers[kind] = numbers.get(kind, 0) + number
    return Weights(numbers, is_quantized(config))


def is_quantized(config: PretrainedConfig) -> bool:
    """True if a config says that its checkpoint holds quantized weights."""
    return getattr(config, "quantization_config", None) is not None


def _weight_files(folder: Path, config: PretrainedConfig) -> list[Path]:
    """Return the files that transformers reads a folder's weights from.

    Raises:
        InvalidInputError: There are no such files, or their index cannot be read.
    """
    named = getattr(config, "transformers_weights", None)
    for name in (named,) if named else (_WHOLE, _INDEX, _OLD, _OLD_INDEX):
        file = folder / name
        if not file.is_file():
            continue
        if not name.endswith(".index.json"):
            return [file]
        index = read_json(file).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise InvalidInputError(f"{file} has no 'weight_map' of its weights; {_AGAIN}.")
        return [folder / str(part) for part in sorted(set(index.values()))]
    raise InvalidInputError(
        f"the folder {str(folder)!r} has a config.json but no weights ({named or _WHOLE}, say); "
        "give a folder that has both."
    )


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        InvalidInputError: The file cannot be read, is not JSON, or holds no object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInputError(
            f"{file} cannot be used: it is not JSON ({error}); {_AGAIN}."
        ) from error
    if not isinstance(found, dict):
        raise InvalidInputError(f"{file} holds no JSON object; {_AGAIN}.")
    return found


def _check_there(file: Path) -> None:
    """Refuse a file of weights that is missing or empty.

    Raises:
        InvalidInputError: It is missing or empty.
    """
    if not file.is_file():
        raise InvalidInputError(f"the weights' file {file} is missing; {_AGAIN}.")
    if file.stat().st_size == 0:
        raise InvalidInputError(f"the weights' file {file} is empty; {_AGAIN}.")


def _header(file: Path) -> list[tuple[str, str, int]]:
    """Return name, dtype and count of numbers of each tensor in a safetensors file.

    Raises:
        InvalidInputError: The file is damaged, for example cut short.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            parts = [(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118
            return [(name, one.get_dtype(), math.prod(one.get_shape())) for name, one in parts]
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(
            f"the weights' file {file} is damaged or was not fetched whole ({error}); {_AGAIN}."
        ) from error


def _is_pointer(file: Path) -> bool:
    """True if a file is a Git LFS pointer."""
    try:
        if not file.is_file() or file.stat().st_size > 1024:
            return False
        with file.open("rb") as opened:
            return opened.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def _bits(kind: str) -> int:
    """Return the bits of a number, from a dtype's name in torch or safetensors."""
    found = re.search(r"\d+", kind)
    return int(found[0]) if found else 8


def _listed(names: Sequence[str]) -> str:
    """Return some of the names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
