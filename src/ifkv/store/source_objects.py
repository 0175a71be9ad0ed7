"""The sources of a remote store's documents: small objects beside them, never rewritten."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Sequence
from typing import Protocol

from ifkv.documents.source import Source
from ifkv.errors import StoreError
from ifkv.store.format import checksum


class Files(Protocol):
    """Files of a remote store."""

    def sizes(self, path: str) -> dict[str, int]:
        """Return bytes by path of all files below one."""
        ...

    def read(self, path: str, start: int, end: int) -> bytes:
        """Return bytes of a file."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        ...


class SourceObjects:
    """Sources by key. Each call of `add` writes one object, named by the checksum of its bytes.

    So writers never conflict: equal sources are one object, different ones are different objects.
    Removed documents leave their sources behind, which are never returned.

    Args:
        files: The store's files.
        folder: The folder of these objects.
    """

    def __init__(self, files: Files, folder: str):
        self._files = files
        self._folder = folder
        self._read: set[str] = set()
        self._listed = False
        self._found: dict[str, list[Source]] = {}
        self._lock = threading.Lock()

    def add(self, sources: Sequence[tuple[str, Source]]) -> None:
        """Add sources; nothing is written if all of them are known.

        Raises:
            StoreError: They cannot be written.
        """
        known = self.find([key for key, _ in sources])
        new = [pair for pair in dict.fromkeys(sources) if pair[1] not in known.get(pair[0], ())]
        if not new:
            return
        data = json.dumps([[key, source.to_json()] for key, source in new]).encode()
        name = f"{checksum(data)}.json"
        self._files.write(f"{self._folder}/{name}", data)
        with self._lock:
            self._take(name, data)

    def find(self, keys: Sequence[str] | None = None) -> dict[str, list[Source]]:
        """Return sources by key; of all, with those added by others since, if ``keys`` is None.

        For given keys, the objects are listed only once: a question does not wait for a listing.

        Raises:
            StoreError: They cannot be read.
        """
        with self._lock:
            if keys is None or not self._listed:
                self._listed = True  # also if it fails: the next question does not wait again
                for path, size in sorted(self._files.sizes(self._folder).items()):
                    name = path.rpartition("/")[2]
                    if name.endswith(".json") and name not in self._read:
                        with contextlib.suppress(FileNotFoundError):  # removed just now
                            self._take(name, self._files.read(path, 0, size))
            wanted = self._found if keys is None else keys
            return {key: list(self._found[key]) for key in wanted if key in self._found}

    def _take(self, name: str, data: bytes) -> None:
        """Read an object's sources.

        Raises:
            StoreError: Its bytes are not those that were written, or hold no sources.
        """
        if name != f"{checksum(data)}.json":
            raise StoreError(
                f"the sources in {self._folder}/{name} have arrived damaged; try again, or remove "
                "that object and encode its documents again, which computes nothing anew."
            )
        try:
            pairs = [(str(key), Source.from_json(text)) for key, text in json.loads(data)]
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{self._folder}/{name} holds no sources ({error}); remove that object."
            ) from error
        for key, source in pairs:
            own = self._found.setdefault(key, [])
            if source not in own:
                own.append(source)
        self._read.add(name)
