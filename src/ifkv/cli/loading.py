"""Load the models that command lines name, refusing what can be refused before any weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ifkv.generation_settings import GenerationSettings

DTYPES = ("float32", "float64", "bfloat16", "float16")
# "name" or "owner/name"; anything else can only be a path.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_model(name: str, *, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """A causal language model by folder or hub id, in ``eval()`` mode.

    Raises:
        InvalidInputError: The dtype is unknown, there is no such model, or no such device.
        UnsupportedModelError: No family covers the model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ifkv.progress import without_loading_bars

    check_model(name, dtype=dtype, device=device)
    try:
        with without_loading_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"the weights of {name!r} cannot be loaded ({_first_line(error)}); give a model that "
            "is complete."
        ) from error
    try:
        loaded: PreTrainedModel = model.eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise _no_device(device, error) from error
    return loaded


def check_model(name: str, *, dtype: str, device: str) -> PretrainedConfig:
    """Refuse all that can be refused of a model before its weights are read.

    Returns:
        The model's config.

    Raises:
        InvalidInputError: The dtype is unknown, there is no such model, or no such device.
        UnsupportedModelError: No family covers the model.
    """
    from ifkv.families import family_of

    check_dtype(dtype)
    config = load_config(name)
    family_of(config, (config.architectures or [name])[0])
    check_device(device)
    return config


def check_dtype(dtype: str) -> None:
    """Refuse the name of a dtype that is none of :data:`DTYPES`.

    Raises:
        InvalidInputError: It is none.
    """
    if dtype not in DTYPES:
        raise InvalidInputError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")


def load_config(name: str) -> PretrainedConfig:
    """The config of a model by folder or hub id; no weights are read.

    Raises:
        InvalidInputError: There is no such model.
    """
    _check_place(name)
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            raise InvalidInputError(
                f"the config.json in {name!r} cannot be used ({_first_line(error)}); give the "
                "folder of a model that transformers knows."
            ) from error
        raise InvalidInputError(
            f"{name!r} is neither a folder with a model nor a hub id that can be loaded "
            f"({_first_line(error)}); check its spelling, or give a folder."
        ) from error
    return config


def _check_place(name: str) -> None:
    """Refuse a path that leads to no model, before transformers takes it for a hub id.

    Raises:
        InvalidInputError: There is no such folder, or no model in it.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InvalidInputError(
                f"the folder {name!r} has no config.json, so there is no model in it; give the "
                "folder that holds a model's config.json, weights and tokenizer."
            )
    elif path.exists():
        raise InvalidInputError(f"{name} is a file; give the folder that holds the model.")
    elif name.startswith(("/", ".", "~")):
        raise InvalidInputError(f"there is no folder {name}; give one with a model, or a hub id.")
    elif _HUB_ID.fullmatch(name) is None:
        raise InvalidInputError(
            f"{name!r} is neither a folder with a model nor a hub id, which has the form "
            "owner/name; check the path."
        )


def check_device(device: str) -> None:
    """Refuse a device on which nothing can be computed here.

    Raises:
        InvalidInputError: There is no such device.
    """
    import torch

    try:
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each device its own
        raise _no_device(device, error) from error


def _no_device(device: str, error: Exception) -> InvalidInputError:
    return InvalidInputError(
        f"device {device!r} cannot be used here ({_first_line(error)}); give cpu, or install a "
        "build of torch that supports it."
    )


def check_generation(name: str, max_new_tokens: int | None = None) -> GenerationSettings:
    """Refuse what a model's ``generation_config.json`` asks for and no answer has a place for.

    Args:
        name: Folder or hub id of the model.
        max_new_tokens: Length of an answer at most, which comes before the file's.

    Returns:
        What is said there and here.

    Raises:
        InvalidInputError: It asks for such, or cannot be read.
    """
    from transformers import GenerationConfig

    from ifkv.generation_checks import check_configs, check_one_answer
    from ifkv.generation_settings import GenerationSettings

    file, config = Path(name) / "generation_config.json", None
    if file.exists() or not Path(name).is_dir():
        try:
            config = GenerationConfig.from_pretrained(name)
        except (OSError, ValueError, TypeError) as error:
            if file.exists():  # else of the hub, where a model need not have one
                raise InvalidInputError(
                    f"{file} cannot be used ({_first_line(error)}); mend it, or take it away."
                ) from error
    given = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    settings = GenerationSettings(given, config)
    check_one_answer(settings)
    check_configs(settings)
    return settings


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model that is there.

    Raises:
        InvalidInputError: It has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{name!r} has no tokenizer that can be loaded ({_first_line(error)}); give the folder "
            "of a model with its tokenizer, or a hub id."
        ) from error


def _first_line(error: Exception) -> str:
    """The beginning of another library's message, as part of a sentence."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".: ") if text else repr(error)
