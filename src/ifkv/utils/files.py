"""Files written whole or not at all, and the folder for what can be made again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$IFKV_CACHE``, or else the user's cache folder of ifkv."""
    if chosen := os.environ.get("IFKV_CACHE"):
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("ifkv")


def write_whole(path: Path, text: str) -> None:
    """Write text to a file so that a reader finds the old content or the new, never a part.

    The text is written to a temporary file beside it, which then takes its name. The folder is
    made if it does not exist. Everybody may read the file.

    Args:
        path: Path of the file.
        text: The content, written as UTF-8.

    Raises:
        OSError: The folder cannot be made or written, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes files that only the user can read.
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
