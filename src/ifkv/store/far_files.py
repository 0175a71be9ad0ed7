"""Remote files behind a URL: calls with a deadline, and one family of errors."""

from __future__ import annotations

import contextlib
import errno
import importlib
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ifkv.errors import (
    InvalidInputError,
    StoreError,
    StoreNotFoundError,
    StoreUnavailableError,
)

T = TypeVar("T")

# Object stores: an upload appears whole or not at all, and a rename is a copy.
_OBJECTS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "memory"}
# Object stores whose path begins with a bucket or container, which ifkv does not create.
_BUCKETS = _OBJECTS - {"memory"}
_READ_ONLY = {"http", "https"}
# File systems repeat some requests themselves; these repeat what still fails.
_TRIES = 3
_FIRST_PAUSE = 0.2
# A request that moves bytes gets time beyond the deadline at this rate.
_SLOWEST_BYTES_PER_SECOND = 2**20
# After a failure that took this long, the store fails at once for a while.
_LONG_SECONDS = 1.0
_REST_SECONDS = 10.0


class FarFiles:
    """Folder behind a URL.

    Every call ends within the deadline, even if the file system hangs: with its answer, with
    ``FileNotFoundError``, or with a `StoreUnavailableError`. After a failure that took a second or
    more, calls fail at once for ten seconds.

    Attributes:
        url: The URL, as given.
        root: Its path in the file system.

    Args:
        url: Such as ``"s3://bucket/folder"``.
        deadline: Seconds for one request, repetitions included; plus one second for each MiB that
            it moves.
        options: Options of fsspec.

    Raises:
        InvalidInputError: ``deadline`` is not positive.
        StoreNotFoundError: fsspec cannot open this kind of URL, or there is no such bucket.
    """

    def __init__(self, url: str, deadline: float, options: dict[str, Any]):
        if not deadline > 0:
            raise InvalidInputError(f"deadline is {deadline}; give a positive number of seconds.")
        try:
            fsspec: Any = importlib.import_module("fsspec.core")
            self._files, root = fsspec.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise StoreNotFoundError(
                f"the store {url} cannot be opened: {error}. Run pip install -e '.[remote]' in "
                "the clone of ifkv, and install what fsspec needs for this kind of URL (s3fs for "
                "s3://, gcsfs for gs://)."
            ) from error
        self.url = url
        self.root = root.rstrip("/")
        self._deadline = deadline
        protocol = self._files.protocol
        names = {protocol} if isinstance(protocol, str) else set(protocol)
        self._objects = bool(names & _OBJECTS)
        self._read_only = bool(names & _READ_ONLY)
        # File systems that are neither asynchronous nor local often have one connection.
        several = getattr(self._files, "async_impl", False) or names & {"file", "local", "memory"}
        self._turn: Any = contextlib.nullcontext() if several else threading.Lock()
        self._failed: tuple[float, str] | None = None
        if names & _BUCKETS:
            self._check_bucket()

    def _check_bucket(self) -> None:
        """Refuse a bucket that is known to be missing."""
        bucket = self.root.partition("/")[0]
        try:
            self._ask("looking for its bucket", lambda: self._files.info(bucket))
        except FileNotFoundError:
            raise StoreNotFoundError(
                f"the store {self.url} cannot be opened: there is no bucket {bucket!r}. Correct "
                "the URL, or make the bucket; ifkv makes none."
            ) from None
        except StoreUnavailableError:
            return  # credentials may allow objects, but not buckets; a later call then fails

    def exists(self, path: str) -> bool:
        """True if the file exists."""
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int | None:
        """Return a file's size now; None if the file system does not know it.

        Raises:
            FileNotFoundError: It is not there.
            StoreUnavailableError: The file system does not answer.
        """

        def look() -> dict[str, Any]:
            self._files.invalidate_cache()  # other processes write, too
            found: dict[str, Any] = self._files.info(path)
            return found

        size = self._ask("looking for a document", look)["size"]
        return None if size is None else int(size)

    def read(self, path: str, start: int, end: int) -> bytes:
        """Read bytes ``start:end``: fewer if the file ends before, all if it has no ranges.

        Raises:
            FileNotFoundError: It is not there.
            StoreUnavailableError: They cannot be read now.
        """
        # By keyword: the order of these two differs between file systems.
        found: bytes = self._ask(
            "reading a document",
            lambda: self._files.cat_file(path, start=start, end=end),
            end - start,
        )
        return found

    def write(self, path: str, data: bytes) -> None:
        """Write a file, whole or not at all.

        Raises:
            StoreUnavailableError: It cannot be written.
            StoreError: The place is read-only.
        """
        if self._read_only:
            raise StoreError(
                f"the store {self.url} can only be read; put documents where its server has its "
                "files, and open that place to write."
            )
        try:
            self._ask("writing a document", lambda: self._write(path, data), len(data))
        except FileNotFoundError as error:
            raise self._error("writing a document", _words(error)) from error

    def _write(self, path: str, data: bytes) -> None:
        if self._objects:  # folders are only names, and buckets exist
            self._files.pipe_file(path, data)
            return
        temporary = f"{self.root}/tmp/{secrets.token_hex(8)}.tmp"
        for each in (path, temporary):
            self._files.makedirs(self._files._parent(each), exist_ok=True)
        try:
            self._files.pipe_file(temporary, data)
            self._files.mv(temporary, path)
        except Exception:
            with contextlib.suppress(Exception):
                self._files.rm_file(temporary)
            raise

    def remove(self, path: str) -> None:
        """Remove a file.

        Raises:
            FileNotFoundError: It is not there.
            StoreUnavailableError: It cannot be removed.
        """
        if not self.exists(path):  # object stores ignore a missing file
            raise FileNotFoundError(path)
        self._ask("removing a document", lambda: self._files.rm_file(path))

    def sizes(self, path: str) -> dict[str, int]:
        """Return paths and sizes of all files below a path.

        Raises:
            StoreUnavailableError: They cannot be listed.
        """

        def look() -> dict[str, dict[str, Any]]:
            self._files.invalidate_cache()
            found: dict[str, dict[str, Any]] = self._files.find(path, detail=True)
            return found

        try:
            found = self._ask("listing documents", look)
        except FileNotFoundError:
            return {}
        return {name: int(info["size"]) for name, info in found.items()}

    def _ask(self, what: str, call: Callable[[], T], nbytes: int = 0) -> T:
        """Run a call, repeat it if that may help, and return its answer before the deadline."""
        started = time.monotonic()
        if self._failed is not None and started < self._failed[0] + _REST_SECONDS:
            raise self._error(what, self._failed[1])
        until = started + self._deadline + nbytes / _SLOWEST_BYTES_PER_SECOND
        pause = _FIRST_PAUSE
        failure: Exception | None = None
        for tries in range(_TRIES):
            if tries:
                time.sleep(pause)
                pause *= 4
            try:
                answer = _within(until - time.monotonic(), call, self._turn)
            except FileNotFoundError as error:
                if _is_missing(error):
                    self._failed = None
                    raise
                failure = error
            except Exception as error:  # each file system has other exceptions
                failure = error
            else:
                self._failed = None
                return answer
            if _is_final(failure) or time.monotonic() + pause >= until:
                break
        reason = _words(failure)
        if time.monotonic() - started >= _LONG_SECONDS and not _is_final(failure):
            self._failed = (time.monotonic(), reason)
        raise self._error(what, reason) from failure

    def _error(self, what: str, reason: str) -> StoreUnavailableError:
        return StoreUnavailableError(
            f"the store {self.url} failed at {what}: {reason}. What it holds is as it was; check "
            "the network, the endpoint, the credentials and what they allow.",
            reason=reason,
        )


def _within(seconds: float, call: Callable[[], T], turn: Any) -> T:
    """Return a call's result, or abandon it when its time is over.

    Raises:
        TimeoutError: Its time is over.
        Exception: The call's error.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            with turn:
                done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    # A daemon: a server that never answers must not keep the process from ending.
    threading.Thread(target=run, name="ifkv-store", daemon=True).start()
    try:
        return done.result(timeout=max(0.0, seconds))
    except TimeoutError:
        if done.done():
            raise
        raise TimeoutError(f"no answer within {seconds:.0f} seconds") from None


def _is_missing(error: FileNotFoundError) -> bool:
    """True if the server said so; file systems also raise it for a server out of reach."""
    cause = error.__cause__
    if cause is None or isinstance(cause, FileNotFoundError):
        return True
    status = getattr(cause, "status", None)
    if status is not None:
        return status in (404, 410)
    return not isinstance(cause, OSError) and not type(cause).__module__.startswith("aiohttp")


def _is_final(error: Exception | None) -> bool:
    """True if trying again does not change the answer, such as "not allowed" or "no such range"."""
    if isinstance(error, PermissionError | NotImplementedError | TypeError | ValueError):
        return True
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(error, OSError) and error.errno in (errno.EINVAL, errno.ENOSYS, errno.EPERM)


def _words(error: BaseException | None) -> str:
    """Return an exception's type and message in one line."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())[:300].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
