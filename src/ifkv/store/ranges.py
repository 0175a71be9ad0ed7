"""Reads of a remote object: few requests, however many layers it has."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from ifkv.errors import StoreUnavailableError
from ifkv.store.far_files import FarFiles
from ifkv.store.format import FormatError

# Fetched when an object is opened: header, tokens, and all of a small object.
HEAD_BYTES = 2**18
# Bytes of each further request: enough to make the round trip negligible.
PIECE_BYTES = 8 * 2**20
# Requests at once for a document that is read whole.
_TOGETHER = 8
# How many times a request is made if too few bytes arrive without an error.
_TRIES = 2


class ObjectRanges:
    """Source of an object's bytes: its head at once, the rest in pieces, each fetched once.

    Several threads may read; those that need the same piece wait for one request. A piece is kept
    until all of its bytes have been read.

    Attributes:
        size: Bytes of the object. If it is longer than its head, None until a reader of its header
            sets it.

    Args:
        files: The remote files.
        path: The object's path.

    Raises:
        FileNotFoundError: The object does not exist.
        StoreUnavailableError: It cannot be read.
    """

    size: int | None

    def __init__(self, files: FarFiles, path: str):
        self._files = files
        self._path = path
        self._lock = threading.Lock()
        self._pieces: dict[int, Future[bytes]] = {}
        self._unused: dict[int, int] = {}
        self._singly = False
        # As many bytes as requested: the file goes on. More: a server without ranges.
        try:
            self._head = files.read(path, 0, HEAD_BYTES)
        except StoreUnavailableError as error:
            # An S3 server's answer to a range of an empty object.
            if getattr(error.__cause__, "errno", None) != errno.EINVAL or files.size(path) != 0:
                raise
            self._head = b""
        self.size = None if len(self._head) == HEAD_BYTES else len(self._head)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``offset`` on.

        Raises:
            FormatError: The object ends before.
            StoreUnavailableError: They cannot be read now.
        """
        at, end = offset, offset + target.nbytes
        if self.size is not None and end > self.size:
            raise FormatError(f"it ends at byte {self.size}")
        while at < end:
            if at < len(self._head):
                part = memoryview(self._head)[at:end]
            elif self._singly or self.size is None:
                part = memoryview(self._fetch(at, end))
            else:
                part = self._part(at, end)
            target[at - offset : at - offset + len(part)] = part
            at += len(part)

    def fetch_all(self) -> None:
        """Fetch all pieces, several at once; a failed piece is fetched again when it is read."""
        count = -(-((self.size or 0) - len(self._head)) // PIECE_BYTES)
        if count > 1 and not self._singly:
            with ThreadPoolExecutor(min(count, _TOGETHER), "ifkv-fetch") as threads:
                for index in range(count):
                    threads.submit(self._piece, index)

    def read_anew(self) -> None:
        """Drop the pieces, which were damaged, and request each range separately from now on."""
        with self._lock:
            self._singly = True
            self._pieces.clear()
            self._unused.clear()

    def _part(self, at: int, end: int) -> memoryview:
        """Return bytes from ``at`` to ``end`` or to the end of its piece."""
        index = (at - len(self._head)) // PIECE_BYTES
        start = len(self._head) + index * PIECE_BYTES
        data = self._piece(index)
        part = memoryview(data)[at - start : end - start]
        with self._lock:
            left = self._unused.get(index, len(data)) - len(part)
            self._unused[index] = left
            if left <= 0:
                self._pieces.pop(index, None)
                self._unused.pop(index, None)
        return part

    def _piece(self, index: int) -> bytes:
        with self._lock:
            fetched = self._pieces.get(index)
            mine = fetched is None
            if fetched is None:
                fetched = self._pieces[index] = Future()
        if mine:
            assert self.size is not None
            start = len(self._head) + index * PIECE_BYTES
            try:
                fetched.set_result(self._fetch(start, min(start + PIECE_BYTES, self.size)))
            except BaseException as error:
                with self._lock:
                    if self._pieces.get(index) is fetched:
                        del self._pieces[index]  # the next reader tries again
                fetched.set_exception(error)
        return fetched.result()

    def _fetch(self, start: int, end: int) -> bytes:
        """Fetch all bytes ``start:end``.

        Raises:
            FormatError: The object is shorter, as its server confirms.
            StoreUnavailableError: Not all of them arrived.
        """
        failure: StoreUnavailableError | None = None
        for _ in range(_TRIES):
            try:
                data = self._files.read(self._path, start, end)
            except StoreUnavailableError as error:
                failure = error
                break
            if len(data) == end - start:
                return data
            if len(data) > end - start and len(data) >= end:
                return data[start:end]  # a server without ranges
            failure = self._cut(len(data), end - start)
        size = self._files.size(self._path)
        if size is not None and size < end:
            raise FormatError(f"it ends at byte {size}")
        assert failure is not None
        raise failure

    def check_arrived(self) -> None:
        """Check that all of the object has arrived, after its bytes made no sense.

        Raises:
            StoreUnavailableError: The object is longer than what arrived.
        """
        if self.size == len(self._head):
            size = self._files.size(self._path)
            if size is not None and size != self.size:
                raise self._cut(self.size, size)

    def _cut(self, arrived: int, wanted: int) -> StoreUnavailableError:
        reason = f"{arrived} of {wanted} bytes arrived"
        return StoreUnavailableError(
            f"the store {self._files.url} failed at reading a document: {reason}.", reason=reason
        )
