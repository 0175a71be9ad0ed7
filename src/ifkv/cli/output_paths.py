"""Checks of the files and folders that commands write, before any work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    from rich.console import Console


def check_page(page: Path | None) -> None:
    """Refuse the path of a page that cannot be written; its folder is not made.

    Raises:
        InvalidInputError: Its folder does not exist or cannot be written, or the path is a folder.
    """
    if page is None:
        return
    if page.is_dir():
        raise InvalidInputError(
            f"--html is {page}, a folder; name a file in it, such as {page / 'page.html'}."
        )
    if not page.parent.is_dir():
        raise InvalidInputError(
            f"--html is {page}, but there is no folder {page.parent}; make it, or name another."
        )
    _check_writable(page.parent, "--html", page)


def check_store(where: str | None) -> None:
    """Refuse a store to ask over that does not exist; it is not made.

    Args:
        where: Value of ``--store``: a folder or URL; the user's cache folder if None.

    Raises:
        InvalidInputError: The store does not exist, or is ``memory``.
    """
    from ifkv.store import default_store_path

    if where == "memory":
        raise InvalidInputError(
            "--store memory holds nothing yet; give files to ask over, or a --store with documents."
        )
    named = os.environ.get("IFKV_STORE", "") if where is None else where
    if "://" in named:
        return
    folder = default_store_path() if where is None else Path(where).expanduser()
    if not (folder / "documents").is_dir():
        raise InvalidInputError(
            f"there are no files to ask over and no store in {folder}; give files, name a store "
            "with --store, or make one with ifkv encode."
        )


def check_results(folder: Path) -> None:
    """Refuse a folder of results that can neither be made nor written.

    Raises:
        InvalidInputError: The path is a file, lies in one, or cannot be written.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InvalidInputError(f"--out is {folder}, but {there} is a file; name a folder.")
    _check_writable(there, "--out", folder)


def _check_writable(folder: Path, option: str, wanted: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidInputError(
            f"{option} is {wanted}, but {folder} may not be written; name another place."
        )


def say_written(console: Console, path: Path) -> None:
    """Print the path of a written file as the user gave it."""
    console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
