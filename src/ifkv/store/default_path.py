"""Default folder of the store, in a module that imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from ifkv.errors import InvalidInputError
from ifkv.utils.files import cache_folder


def default_store_path() -> Path:
    """Return the folder ``IFKV_STORE``, or ``store`` in ``IFKV_CACHE`` or the user's cache folder.

    Raises:
        InvalidInputError: ``IFKV_STORE`` is a URL, which is no path; `open_store` takes it.
    """
    if given := os.environ.get("IFKV_STORE"):
        if "://" in given:
            raise InvalidInputError(
                f"IFKV_STORE is {given}, and a folder on this machine is wanted here; name one."
            )
        return Path(given).expanduser().absolute()
    return cache_folder() / "store"
