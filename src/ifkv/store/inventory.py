"""Listing of a disk store's index, without torch."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ifkv.store.folder import Folder
from ifkv.store.recovery import open_index
from ifkv.store.source_table import SourceTable

if TYPE_CHECKING:
    from ifkv.documents.source import Source
    from ifkv.store.index import Entry


class Inventory:
    """Entries of a folder, as `DiskStore` lists them.

    Args:
        path: The folder.

    Raises:
        StoreError: The folder cannot be used.
    """

    def __init__(self, path: Path):
        self.path = path.expanduser().absolute()
        self._folder = Folder(self.path)
        self._index = open_index(self._folder)

    def entries(self) -> list[Entry]:
        """Return the index's entries, least recently used first."""
        return self._index.entries()

    def sources(self) -> dict[str, list[Source]]:
        """Return the sources of documents by key."""
        return SourceTable(self._index).find(None)

    def quarantined(self) -> int:
        """Return the number of quarantined files."""
        return len(self._folder.quarantine_files())

    def __enter__(self) -> Inventory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._index.close()
