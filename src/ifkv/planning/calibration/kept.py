"""Rates of this machine, measured once and kept in the user's cache folder."""

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
from ifkv.utils.files import cache_folder, write_whole
from ifkv.version import __version__

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
    """Return this machine's rates for a model: kept ones, or measured now.

    Args:
        config: The model's config.
        shape: The model's shape.
        dtype: Dtype of weights and cache.
        device: Device to run on.
        backend: As in [ifkv.patch][].
        again: If True, measure even if rates are kept.

    Returns:
        The rates. Measuring takes some seconds, and a `CalibrationWarning` says so. Doubtful rates
        are kept like others, since a machine that is never idle would otherwise be measured for
        every plan. They carry their disagreement, and every plan made from them warns
        (`ifkv.planning.sanity`).
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
        "measuring how fast this machine runs layers of this shape, once; that takes ten to "
        "fifteen seconds"
    )
    if not again and path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or found.get("about") != about:
                raise ValueError("it describes another machine")
            return Rates.from_json(found.get("rates"))
        except (OSError, ValueError, RecursionError) as error:
            notice = f"{path} cannot be used ({error}): {notice}"
    warnings.warn(f"{notice}.", CalibrationWarning, stacklevel=3)
    disk = _writable(path.parent)
    made = measure(config, shape, dtype=dtype, device=device, backend=backend, disk=disk)
    if disk is not None:
        write_whole(path, json.dumps({"about": about, "rates": made.to_json()}, indent=1))
    return made


def _writable(folder: Path) -> Path | None:
    """Return the folder, made if need be; None, with a warning, if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be written ({error}): the rates will be measured again next "
            "time, and its disk is not measured; set IFKV_CACHE to a folder that can be written.",
            CalibrationWarning,
            stacklevel=4,
        )
        return None


def calibration_folder() -> Path:
    """Return the folder of kept rates: ``calibration`` in the cache folder."""
    return cache_folder() / "calibration"


def _machine(device: torch.device) -> dict[str, Any]:
    """Return what the rates depend on, besides the model."""
    import transformers

    processor = _processor()
    if device.type == "cuda":
        processor = f"{torch.cuda.get_device_name(device)} beside {processor}"
    return {
        "version": VERSION,
        "ifkv": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device.type,
        "processor": processor,
        "processors": os.cpu_count(),
    }


def _processor() -> str:
    """Return the processor's name, by which machines that share a home folder are told apart."""
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()
