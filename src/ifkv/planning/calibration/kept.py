"""Rates are measured once and kept, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ifkv.cost import ModelShape
from ifkv.errors import CalibrationWarning
from ifkv.planning.calibration.measure import measure
from ifkv.planning.calibration.rates import VERSION, Rates

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def rates_for(
    config: PretrainedConfig,
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    backend: str = "auto",
    again: bool = False,
) -> Rates:
    """This machine's rates for a model: those that are kept, or measured now.

    Args:
        config: The model's config.
        shape: The model's shape.
        dtype: Of weights and cache.
        device: Where it runs.
        backend: As in [ifkv.patch][].
        again: Measure in any case.

    Returns:
        The rates. Measuring takes some seconds, of which a `CalibrationWarning` tells.
        Doubtful ones are kept like others: they know their disagreement, and whoever plans by
        them is told each time (`ifkv.planning.sanity`). A machine that is never at rest would
        otherwise be measured again for every plan.
    """
    about = _machine(device) | {
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "backend": backend,
        "family": config.model_type,
        "layer": [
            shape.layer_parameters,
            shape.attention_width,
            shape.kv_width,
            shape.hidden_size,
            shape.head_dim,
        ],
        "layers": shape.num_layers,
        "vocabulary": shape.vocabulary,
        "positions": config.max_position_embeddings,
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = calibration_folder() / f"rates-{name}.json"
    notice = (
        "measuring what this machine does with layers of this shape; that takes ten to fifteen "
        "seconds, once"
    )
    if not again and path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or found.get("about") != about:
                raise ValueError("it is about another machine")
            return Rates.from_json(found.get("rates"))
        except (OSError, ValueError, RecursionError) as error:
            notice = f"{path} cannot be used ({error}): {notice}"
    warnings.warn(f"{notice}.", CalibrationWarning, stacklevel=3)
    disk = _writable(path.parent)
    made = measure(config, shape, dtype=dtype, device=device, backend=backend, disk=disk)
    if disk is not None:
        _write(path, {"about": about, "rates": made.to_json()})
    return made


def _writable(folder: Path) -> Path | None:
    """The folder, made if need be; None, with a warning, if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be written ({error}): the rates will be measured again the next "
            "time, and those of a disk not at all; let IFKV_CACHE name a folder that can be "
            "written.",
            CalibrationWarning,
            stacklevel=4,
        )
        return None


def calibration_folder() -> Path:
    """Where rates are kept: ``calibration`` in ``IFKV_CACHE`` or the user's cache folder."""
    import platformdirs

    cache = os.environ.get("IFKV_CACHE") or platformdirs.user_cache_path("ifkv")
    return Path(cache).expanduser().absolute() / "calibration"


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _machine(device: torch.device) -> dict[str, Any]:
    """What rates hold for, beside the model."""
    import transformers

    import ifkv

    processor = _processor()
    if device.type == "cuda":
        processor = f"{torch.cuda.get_device_name(device)} beside {processor}"
    return {
        "version": VERSION,
        "ifkv": ifkv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device.type,
        "processor": processor,
        "processors": os.cpu_count(),
    }


def _processor() -> str:
    """The processor's name; two machines that share a home folder differ in it, or in nothing."""
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()
