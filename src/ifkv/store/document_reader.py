"""Reading of a document's file, whole or a layer at a time, with checks of all bytes read.

Bytes are read into memory, never mapped: a file that shrinks under a mapping kills the process,
while a short read is an error.
"""

from __future__ import annotations

import math
import os
import stat
import threading
import weakref
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ifkv.documents.surrogate import SurrogateContext
from ifkv.errors import InvalidInputError
from ifkv.store.format import (
    MAX_HEADER_BYTES,
    FormatError,
    TensorEntry,
    checksum,
    decode_header,
    layer_name,
)
from ifkv.store.keys import document_key

# Linux reads at most 2 GiB at once.
_MAX_READ = 2**30


class Source(Protocol):
    """Source of a file's bytes."""

    @property
    def size(self) -> int | None:
        """Return the number of bytes; None if only the file's header tells."""
        ...

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``offset`` on.

        Raises:
            FormatError: The file ends before.
            OSError: They cannot be read.
        """
        ...


class FileSource:
    """Open file on disk, which stays readable when its name is removed.

    Args:
        path: The file, which must be a regular file; links are not followed.

    Raises:
        FormatError: It is a link or another special file.
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path):
        flags = os.O_RDONLY
        for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
            flags |= getattr(os, name, 0)
        if path.is_symlink():
            raise FormatError("it is a symbolic link")
        self._descriptor = os.open(path, flags)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._lock = threading.Lock()
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise FormatError("it is not a regular file")
        self.size = status.st_size
        # A file that is replaced or rewritten has another identity.
        self.identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` from ``offset`` on."""
        while target.nbytes:
            piece = target[:_MAX_READ]
            if hasattr(os, "preadv"):
                count = os.preadv(self._descriptor, [piece], offset)
            else:
                with self._lock:
                    os.lseek(self._descriptor, offset, os.SEEK_SET)
                    data = os.read(self._descriptor, piece.nbytes)
                count = len(data)
                piece[:count] = data
            if count == 0:
                raise FormatError(f"it ends at byte {offset}")
            target, offset = target[count:], offset + count

    def close(self) -> None:
        """Close the file; this also happens when the object is collected."""
        self._close()


class BytesSource:
    """File that has been fetched into memory."""

    def __init__(self, data: bytes):
        self._data = memoryview(data)
        self.size = len(data)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` from ``offset`` on."""
        piece = self._data[offset : offset + target.nbytes]
        if piece.nbytes != target.nbytes:
            raise FormatError(f"it ends at byte {self.size}")
        target[:] = piece


class DocumentReader:
    """Reader of a document's file: checks the rows when read, all else when opened.

    Attributes:
        header: The file's header, checked for consistency.
        nbytes: Length of the file according to its header.
        token_ids: Long ``[n]``.
        prefix_ids: Long ``[P]``.
        surrogate: The surrogate context that it was encoded behind, or None.
        sensitivity: Float32 ``[n]``, or None.

    Args:
        source: The file.
        key: The key that it must hold.

    Raises:
        FormatError: The file is not a document of this key.
        OSError: It cannot be read.
    """

    def __init__(self, source: Source, key: str):
        self._source = source
        head = bytearray(8)
        source.read_into(0, memoryview(head))
        length = int.from_bytes(head, "little")
        size = source.size
        if length > MAX_HEADER_BYTES or (size is not None and length > size - 8):
            raise FormatError(f"its header claims {length} bytes of a file of {size or 'any size'}")
        text = bytearray(length)
        source.read_into(8, memoryview(text))
        self._data_start = 8 + length
        data_bytes = None if size is None else size - self._data_start
        self.header = decode_header(bytes(text), data_bytes)
        self._entries = {entry.name: entry for entry in self.header.tensors()}
        self.nbytes = self._data_start + max(entry.end for entry in self._entries.values())
        self.token_ids = self._tensor("token_ids")
        self.prefix_ids = self._tensor("prefix_ids")
        self.surrogate: SurrogateContext | None = None
        if lengths := self.header.surrogate_lengths:
            texts = self._tensor("surrogate_ids").split(list(lengths))
            try:
                self.surrogate = SurrogateContext(texts).shared()
            except InvalidInputError as error:
                raise FormatError(f"its surrogate context is none: {error}") from error
        self.sensitivity = self._tensor("sensitivity") if self.header.sensitivity else None
        self._scales: dict[str, Tensor] = {}
        if not self.header.codec.exact:
            self._scales = {part: self._tensor(f"scales.{part}") for part in ("keys", "values")}
        held = document_key(
            self.header.fingerprint,
            self.prefix_ids,
            self.token_ids,
            None if self.surrogate is None else self.surrogate.identity,
        )
        if held != self.header.key or held != key:
            raise FormatError(f"it holds the document {held}, another than its name says")

    def read_layer(
        self, layer: int, *, verify: bool, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read the keys and values of one layer.

        Args:
            layer: The layer's number.
            verify: Check them against their checksums.
            out: Output, ``[2, kv_heads, n, head_dim]``, contiguous, of the document's dtype;
                allocated if None.

        Returns:
            Keys and values, each ``[kv_heads, n, head_dim]``: the two halves of ``out``.

        Raises:
            FormatError: They do not match their checksums, or the file ends before them.
            OSError: They cannot be read.
        """
        header = self.header
        if out is None:
            out = allocate((2, *header.shape[1:]), header.dtype)
        first = self._entries[layer_name(layer, "keys")]
        stored = out if header.codec.exact else allocate(tuple(out.shape), first.dtype)
        view = _writable(stored)
        self._source.read_into(self._data_start + first.start, view)
        half = view.nbytes // 2
        for index, part in enumerate(("keys", "values")):
            if verify:
                self._check(layer_name(layer, part), view[index * half : (index + 1) * half])
            if not header.codec.exact:
                out[index] = header.codec.decode(
                    stored[index], self._scales[part][layer], header.dtype
                )
        return out[0], out[1]

    def _tensor(self, name: str) -> Tensor:
        """Read a small tensor and check it."""
        entry: TensorEntry = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        view = _writable(tensor)
        self._source.read_into(self._data_start + entry.start, view)
        self._check(name, view)
        return tensor

    def _check(self, name: str, data: memoryview) -> None:
        if checksum(data) != self.header.checksums[name]:
            raise FormatError(f"its tensor {name} does not match its checksum")


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate a CPU tensor through numpy, which asks for huge pages where torch does not.

    Reading into fresh memory is mostly page faults; small pages double its time.
    """
    room = np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(room).view(dtype).reshape(shape)


def _writable(tensor: Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(bytearray())
    array: Any = tensor.view(torch.uint8).reshape(-1).numpy()
    return memoryview(array)
