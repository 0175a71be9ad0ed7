"""Free memory for a model's weights."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    from ifkv.cli.checkpoint import Weights

_NO_LIMIT = 2**60  # what the kernel writes where a group has none


def check_room(name: str, weights: Weights, dtype: str, device: str) -> None:
    """Refuse weights that do not fit in memory or on the device.

    Args:
        name: Folder or hub id of the model.
        weights: Content of its checkpoint.
        dtype: Dtype they are loaded in.
        device: Device they go to.

    Raises:
        InvalidInputError: They take more than is free.
    """
    from rich.filesize import decimal

    needed = weights.nbytes(dtype)
    for place, free in (("in memory", free_in_memory()), (f"on {device}", free_on_device(device))):
        if free is None or needed <= free:
            continue
        half = weights.nbytes("bfloat16")
        less = f", --dtype bfloat16 ({decimal(half)})" if half < needed else ""
        raise InvalidInputError(
            f"the weights of {name!r} take {decimal(needed)} in {dtype}, but "
            f"{decimal(max(free, 0))} are free {place}. Give a smaller model{less}, or end what "
            "takes the memory."
        )


def free_on_device(device: str) -> int | None:
    """Return the free bytes of a CUDA device; None for other devices."""
    import torch

    if not device.startswith("cuda"):
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def free_in_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process can still take; None if the system does not say.

    On Linux, this is the available memory, including swap, within the limits of the process's
    control groups (containers have such limits). On other systems, it is the machine's total
    memory.
    control groups leave, as containers have them. Elsewhere the machine's memory as a whole.

    Args:
        root: Root of the system's files.
    """
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE))
    if "MemAvailable" in found:
        left = 1024 * (int(found["MemAvailable"]) + int(found.get("SwapFree", 0)))
        return min([left, *_left_in_groups(root)])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _left_in_groups(root: Path) -> list[int]:
    """Return the free bytes of each control group around this process."""
    left = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, cached = root / "sys/fs/cgroup", "inactive_file"
            limit, usage = "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, cached = root / "sys/fs/cgroup/memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            allowed, used = _read(folder / limit).strip(), _read(folder / usage).strip()
            if allowed.isdigit() and used.isdigit() and int(allowed) < _NO_LIMIT:
                # The cache of read files counts as used, but the kernel gives it up.
                files = re.search(rf"^{cached} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
                left.append(int(allowed) - int(used) + (int(files[1]) if files else 0))
            if folder == top:
                break
    return left


def _read(file: Path) -> str:
    """Return the text of a small system file; an empty text if there is no such file."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
