"""An object far away, read in few requests however many layers it has."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from ifkv.errors import StoreUnavailableError
from ifkv.store.far_files import FarFiles
from ifkv.store.format import FormatError

# Fetched when an object is opened: header, tokens, and the whole of a small one.
HEAD_BYTES = 2**18
# Of one request for the rest: enough that a round trip is little beside it.
PIECE_BYTES = 8 * 2**20
# Requests at once for a document that is read whole.
_TOGETHER = 8
# How often fewer bytes than were asked for may come without an error.
_TRIES = 2


class ObjectRanges:
    """A source of an object's bytes: its head at once, the rest in pieces, each fetched once.

    Several threads may read; those that need the same piece wait for one request. A piece is kept
    until all of it has been used.

    Attributes:
        size: Bytes of the object; None until a reader of its header sets it, if it is longer than
            its head.

    Args:
        files: Where it is.
        path: Its path.

    Raises:
        FileNotFoundError: It is not there.
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
        # Not less than what was asked for is a file that goes on; more, a server without ranges.
        try:
            self._head = files.read(path, 0, HEAD_BYTES)
        except StoreUnavailableError as error:
            # What an S3 server says to a range of nothing.
            if getattr(error.__cause__, "errno", None) != errno.EINVAL or files.size(path) != 0:
                raise
            self._head = b""
        self.size = None if len(self._head) == HEAD_BYTES else len(self._head)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``offset`` on.

        Raises:
            FormatError: The object ends before.
            StoreUnavailableError: They cannot be had now.
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
        """Fetch all pieces, several at once; what fails is tried again when it is read."""
        count = -(-((self.size or 0) - len(self._head)) // PIECE_BYTES)
        if count > 1 and not self._singly:
            with ThreadPoolExecutor(min(count, _TOGETHER), "ifkv-fetch") as threads:
                for index in range(count):
                    threads.submit(self._piece, index)

    def read_anew(self) -> None:
        """Forget the pieces and ask for each range by itself: what had arrived was damaged."""
        with self._lock:
            self._singly = True
            self._pieces.clear()
            self._unused.clear()

    def _part(self, at: int, end: int) -> memoryview:
        """Bytes from ``at`` on, to ``end`` or the end of the piece that holds it."""
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
                        del self._pieces[index]  # whoever comes next tries again
                fetched.set_exception(error)
        return fetched.result()

    def _fetch(self, start: int, end: int) -> bytes:
        """Bytes ``start:end``, all of them.

        Raises:
            FormatError: The object is shorter: its server says so, too.
            StoreUnavailableError: They did not all arrive.
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
        """Ask whether all of the object has arrived, where its bytes make no sense.

        Raises:
            StoreUnavailableError: It has not: there is more of it.
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
