"""Load models by folder or hub id; refuse what can be refused before weights are read."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ifkv.cli.checkpoint import Weights, check_files, weights_of
from ifkv.cli.placement import AUTO, check_dtype, chosen_device, chosen_dtype, first_line, own_dtype
from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# "name" or "owner/name"; anything else can only be a path.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Checked:
    """Model whose files passed all checks that need no weights.

    Attributes:
        name: Folder or hub id.
        config: Its config.
        dtype: Dtype of the computation; one of `DTYPES`.
        device: Device of the computation.
        nbytes: Bytes of its weights there; None if unknown.
    """

    name: str
    config: PretrainedConfig
    dtype: str
    device: str
    nbytes: int | None

    @property
    def sentence(self) -> str:
        """Return a sentence that says what will be loaded and how large it is."""
        from rich.filesize import decimal

        size = "" if self.nbytes is None else f", {decimal(self.nbytes)} of weights"
        own = own_dtype(self.config)
        kept = "" if own == self.dtype else f" (the checkpoint's dtype is {own})"
        return f"loading {self.name}: {self.dtype} on {self.device}{size}{kept}"


def check_model(name: str, *, dtype: str = AUTO, device: str = AUTO) -> Checked:
    """Check a model as far as possible before its weights are read.

    Args:
        name: Folder or hub id.
        dtype: One of `DTYPES`, or ``auto``.
        device: A device, or ``auto``.

    Raises:
        InvalidInputError: The dtype is unknown, the model is missing or damaged, there is no such
            device, or the weights do not fit.
        UnsupportedModelError: No family covers the model.
    """
    from ifkv.cli.available_memory import check_room
    from ifkv.models.families import family_of

    check_dtype(dtype)
    config = load_config(name)
    family_of(config, (config.architectures or [name])[0])
    device = chosen_device(device)
    dtype = chosen_dtype(dtype, config, device)
    weights = _weights(name, config)
    if weights is not None:
        check_room(name, weights, dtype, device)
    nbytes = None if weights is None else weights.nbytes(dtype)
    return Checked(name, config, dtype, device, nbytes)


def _weights(name: str, config: PretrainedConfig) -> Weights | None:
    """Return the weights of a checkpoint, of a folder or the hub; None if unknown.

    Raises:
        InvalidInputError: A folder's files are missing or damaged.
    """
    if Path(name).is_dir():
        return weights_of(Path(name), config)
    from huggingface_hub import HfApi

    from ifkv.cli.checkpoint import is_quantized

    try:
        found: Any = HfApi().get_safetensors_metadata(name)
        return Weights(dict(found.parameter_count), is_quantized(config))
    except Exception:  # no connection, no such files: loading will say what the matter is
        return None


def load_model(checked: Checked) -> PreTrainedModel:
    """Load a causal language model in ``eval()`` mode, with all weights from its checkpoint.

    Raises:
        InvalidInputError: Weights are missing, damaged or contradict the config, or do not fit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ifkv.models.loaded_weights import check_report
    from ifkv.utils.progress import without_loading_bars

    name, dtype = checked.name, getattr(torch, checked.dtype)
    auto: Any = AutoModelForCausalLM
    try:
        with without_loading_bars(), _without_report():
            model, report = auto.from_pretrained(
                name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _no_room(checked, error) from error
    except Exception as error:  # what damaged files make other libraries raise can be anything
        raise InvalidInputError(
            f"the weights of {name!r} cannot be loaded ({first_line(error)}); give a model that "
            "is complete."
        ) from error
    check_report(report, model, name)
    try:
        model = model.eval()
        if model.device != torch.device(checked.device):  # quantized models may refuse to be moved
            model = model.to(checked.device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _no_room(checked, error) from error
    except Exception as error:  # each device its own
        raise InvalidInputError(
            f"{name!r} cannot be moved to the device {checked.device!r} ({first_line(error)}); "
            "give another with --device."
        ) from error
    loaded: PreTrainedModel = model
    return loaded


def _no_room(checked: Checked, error: Exception) -> InvalidInputError:
    return InvalidInputError(
        f"there is no room for the weights of {checked.name!r} in {checked.dtype} on "
        f"{checked.device} ({first_line(error)}); give a smaller model, another "
        "--dtype or another --device."
    )


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers' table of missing weights out of the log; a sentence says it instead."""

    def wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def load_config(name: str) -> PretrainedConfig:
    """Return the config of a model by folder or hub id; no weights are read.

    Raises:
        InvalidInputError: There is no such model, or its files are damaged.
    """
    _check_place(name)
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name)
    except Exception as error:  # what a damaged file makes other libraries raise can be anything
        if Path(name).is_dir():
            raise InvalidInputError(
                f"the config.json in {name!r} cannot be used ({first_line(error)}); give the "
                "folder of a model that transformers knows."
            ) from error
        raise InvalidInputError(
            f"{name!r} is neither a folder with a model nor a hub id that can be loaded "
            f"({first_line(error)}); check its spelling, or give a folder."
        ) from error
    return config


def _check_place(name: str) -> None:
    """Refuse a path without a model, before transformers takes it for a hub id.

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
        check_files(path)
    elif path.exists():
        raise InvalidInputError(f"{name} is a file; give the folder that holds the model.")
    elif name.startswith(("/", ".", "~")):
        raise InvalidInputError(f"there is no folder {name}; give one with a model, or a hub id.")
    elif _HUB_ID.fullmatch(name) is None:
        raise InvalidInputError(
            f"{name!r} is neither a folder with a model nor a hub id, which has the form "
            "owner/name; check the path."
        )


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model that passed `check_model`.

    Raises:
        InvalidInputError: The model has no tokenizer, or a damaged one.
    """
    from transformers import AutoTokenizer

    from ifkv.session.vocabulary import check_vocabulary

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise InvalidInputError(
            f"{name!r} has no tokenizer that can be loaded ({first_line(error)}); give the folder "
            "of a model with its tokenizer, or a hub id. A tokenizer.json that a newer release "
            "wrote needs pip install --upgrade tokenizers transformers."
        ) from error
    check_vocabulary(tokenizer)
    return tokenizer
