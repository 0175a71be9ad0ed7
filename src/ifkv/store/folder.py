"""The folder of a disk store: publish files, move them to quarantine, clean up."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ifkv.errors import StoreError, StoreFullError
from ifkv.store.keys import KEY_PATTERN

if TYPE_CHECKING:
    from ifkv.store.document_file import DocumentFile

if sys.platform != "win32":
    import fcntl

SUFFIX = ".safetensors"
# Quarantined files are evidence, not data: only the latest are kept.
MAX_QUARANTINED = 32
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Folder:
    """Files of a disk store.

    ``documents/ab/<key>.safetensors`` are the entries, ``tmp`` holds files being written, and
    ``quarantine`` files that cannot be trusted. Names are made from checked keys alone.

    Args:
        path: The folder; made if it does not exist.

    Raises:
        StoreError: It cannot be made or written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.documents = path / "documents"
        self.temporary = path / "tmp"
        self.quarantined = path / "quarantine"
        try:
            for folder in (self.documents, self.temporary, self.quarantined):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"the store's folder {path} cannot be used: {error.strerror}. Give a folder that "
                "can be written."
            ) from error
        if not os.access(path, os.W_OK):
            raise StoreError(
                f"the store's folder {path} may only be read. Open it by its URL, which writes "
                f"nothing when it reads: {path.as_uri()}; or give a folder that can be written."
            )

    def file_of(self, key: str) -> Path:
        """Return the path of a checked key's file."""
        return self.documents / key[:2] / f"{key}{SUFFIX}"

    @contextlib.contextmanager
    def written(self, document: DocumentFile) -> Iterator[Path]:
        """Write a document to a temporary file, durably; remove the file if it is not published.

        Raises:
            StoreFullError: The disk is full.
            StoreError: It cannot be written for another reason.
        """
        path, descriptor = self.temporary, -1
        try:
            with self.full_disk_named(document.nbytes):
                path, descriptor = self._create()
                document.write(descriptor)
                os.fsync(descriptor)
            yield path
        finally:
            if descriptor >= 0:
                path.unlink(missing_ok=True)
                os.close(descriptor)

    def _create(self) -> tuple[Path, int]:
        """Create a temporary file, locked while this process lives against being cleaned up."""
        while True:
            path = self.temporary / f"{secrets.token_hex(8)}.tmp"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            if sys.platform == "win32":
                return path, descriptor  # Windows does not remove open files
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                    return path, descriptor
            except FileNotFoundError:
                pass
            os.close(descriptor)  # cleaned up before it was locked

    def publish(self, temporary: Path, key: str) -> None:
        """Rename a written file to its key's name, durably. Only while the index's lock is held."""
        target = self.file_of(key)
        if not target.parent.is_dir():
            target.parent.mkdir(exist_ok=True)
            _sync(self.documents)
        os.replace(temporary, target)
        try:
            _sync(target.parent)
        except OSError:
            target.unlink(missing_ok=True)
            raise

    def discard(self, key: str) -> None:
        """Remove a key's file, if it exists. Only while the index's lock is held."""
        self.file_of(key).unlink(missing_ok=True)

    def quarantine(self, path: Path, reason: str) -> Path | None:
        """Move a file to quarantine, with the reason beside it. Only under the index's lock.

        Returns:
            Its new path; None if it was gone, or could not be moved and was removed.
        """
        target = self.quarantined / f"{secrets.token_hex(4)}-{path.name[:100]}"
        try:
            os.replace(path, target)
        except FileNotFoundError:
            return None
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            target.with_name(target.name + ".reason.txt").write_text(reason + "\n", "utf-8")
        self._forget_quarantined(MAX_QUARANTINED)
        return target

    def clear_quarantine(self) -> None:
        """Remove all quarantined files."""
        self._forget_quarantined(0)

    def quarantine_files(self) -> list[Path]:
        """Return the quarantined files, the oldest first."""
        found = []
        for path in self.quarantined.iterdir():
            with contextlib.suppress(OSError):
                if not path.name.endswith(".reason.txt"):
                    found.append((path.lstat().st_ctime_ns, path))
        return [path for _, path in sorted(found)]

    def _forget_quarantined(self, keep: int) -> None:
        files = self.quarantine_files()
        for path in files[: max(0, len(files) - keep)]:
            with contextlib.suppress(OSError):
                path.unlink()
                path.with_name(path.name + ".reason.txt").unlink(missing_ok=True)

    def files(self) -> Iterator[tuple[str | None, Path]]:
        """Yield key and path of everything under ``documents``; the key is None for other files."""
        for shard in sorted(self.documents.iterdir()):
            if shard.is_symlink() or not shard.is_dir():
                yield None, shard
                continue
            for path in sorted(shard.iterdir()):
                key = path.name.removesuffix(SUFFIX)
                if KEY_PATTERN.fullmatch(key) and path == self.file_of(key):
                    yield key, path
                else:
                    yield None, path

    def clean_temporary(self) -> int:
        """Remove the temporary files of writers that died.

        Returns:
            The number of files.
        """
        removed = 0
        for path in self.temporary.glob("*.tmp"):
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDWR)
                try:
                    if sys.platform != "win32":
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                    removed += 1
                finally:
                    os.close(descriptor)
        return removed

    @contextlib.contextmanager
    def full_disk_named(self, needed: int) -> Iterator[None]:
        """Turn the system's errors of a write into the store's errors.

        Raises:
            StoreFullError: The disk, or a quota, is full.
            StoreError: Anything else.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise StoreError(
                    f"writing to the store in {self.path} failed: {error.strerror or error}."
                ) from error
            free = "an unknown number of"
            with contextlib.suppress(OSError):
                free = str(shutil.disk_usage(self.path).free)
            raise StoreFullError(
                f"the disk (or quota) under {self.path} is full: {error.strerror}. The document "
                f"needs {needed} bytes, {free} are free. Nothing was stored; make room there, or "
                "lower the store's max_bytes."
            ) from error


def _sync(folder: Path) -> None:
    """Flush a folder's names to the disk, if the system can."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
