"""Load the models and texts that command lines name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = ("float32", "float64", "bfloat16", "float16")


def load_model(name: str, *, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """A causal language model by folder or hub id, in ``eval()`` mode.

    Raises:
        InvalidInputError: The dtype is unknown, there is no such model, or no such device.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise InvalidInputError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from error
    try:
        loaded: PreTrainedModel = model.eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(
            f"device {device!r} cannot be used here ({error}); give cpu, or install a build of "
            "torch that supports it."
        ) from error
    return loaded


def _no_model(name: str, error: Exception) -> InvalidInputError:
    """What to say of a model that cannot be loaded."""
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        return InvalidInputError(f"there is no folder {name}; give one with a model, or a hub id.")
    return InvalidInputError(
        f"{name!r} is neither a folder with a model nor a hub id that can be loaded: "
        f"{str(error).splitlines()[0]}"
    )


def load_config(name: str) -> PretrainedConfig:
    """The config of a model by folder or hub id; no weights are read.

    Raises:
        InvalidInputError: There is no such model.
    """
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from error
    return config


def check_device(device: str) -> None:
    """Refuse a device on which nothing can be computed here.

    Raises:
        InvalidInputError: There is no such device.
    """
    import torch

    try:
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidInputError(
            f"device {device!r} cannot be used here ({str(error).splitlines()[0]}); give cpu, or "
            "install a build of torch that supports it."
        ) from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        InvalidInputError: There is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{name!r} has no tokenizer that can be loaded; give the folder of a model with its "
            f"tokenizer, or a hub id. ({str(error).splitlines()[0]})"
        ) from error


def read_texts(files: Sequence[Path]) -> list[str]:
    """One document per text file.

    Raises:
        InvalidInputError: A file is missing, blank, or not UTF-8 text.
    """
    texts = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(
                f"{file} cannot be read as UTF-8 text ({error}); give plain text or Markdown files."
            ) from error
        if not text.strip():
            raise InvalidInputError(f"{file} is blank; leave it out or give it some text.")
        texts.append(text)
    return texts
