"""Measure how fast documents are read from a folder's disk."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path

DISK_TOKENS = 512


def measure_disk(folder: Path, *, rounds: int = 2) -> tuple[float, float, float]:
    """Measure how fast documents are read from a folder's disk.

    A store of a few MiB is made in a temporary folder inside, and removed again. Where the system
    does not let a program drop files from the page cache, both rates are those of the page cache.

    Args:
        folder: Folder on the disk; made if it does not exist.
        rounds: Number of repetitions.

    Returns:
        Bytes per second from the page cache, bytes per second past it, and seconds to open a
        document.

    Raises:
        StoreError: Nothing can be written there.
        OSError: Nothing can be written there.
    """
    import torch

    from ifkv.documents.cache import DocumentCache
    from ifkv.store import DiskStore

    folder.mkdir(parents=True, exist_ok=True)
    opening: list[float] = []
    reading: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".calibration-") as place:
        generator = torch.Generator().manual_seed(0)  # others' random numbers go on undisturbed
        rows = torch.rand(16, 4, DISK_TOKENS, 64, generator=generator)
        made = [
            DocumentCache(
                torch.arange(number, number + DISK_TOKENS), torch.arange(0), rows, rows, "0" * 32
            )
            for number in range(4)
        ]
        nbytes = sum(document.nbytes for document in made)
        with DiskStore(place) as store:
            keys = [store.put(document) for document in made]
        for cold in (True, False) * rounds:
            if cold:
                _forget(Path(place))
            with DiskStore(place) as store:
                start = time.perf_counter()
                documents = [store.get(key, lazy=True) for key in keys]
                opened = time.perf_counter()
                for document in documents:
                    for layer in range(document.shape[0]):
                        document.layer(layer)
                reading[cold].append(time.perf_counter() - opened)
                opening.append((opened - start) / len(keys))
    return nbytes / min(reading[False]), nbytes / min(reading[True]), min(opening)


def _forget(folder: Path) -> None:
    """Ask the system to drop a folder's files from its page cache, if it takes such advice."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
