"""The file format: the tensors of a document's file, their places and their checksums.

A file is a valid safetensors file. Its header is a function of a few facts (shape, dtype, codec).
A reader computes the header that they imply and refuses any other, so it trusts no offset, size or
shape of the file. ``docs/store-format.md`` describes the format for other programs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import torch
import xxhash

from ifkv.store.codecs import CODECS, Codec
from ifkv.store.keys import FORMAT_VERSION, KEY_PATTERN

FORMAT_NAME = "ifkv-document"
# A file that names a surrogate context is of a version of its own, which older releases refuse.
# All others are what they were.
SURROGATE_VERSION = 2
# The limit of safetensors is 100 MB; this one suffices for ten thousand layers.
MAX_HEADER_BYTES = 16 * 2**20
ALIGNMENT = 64

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}
_ROW_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


class FormatError(Exception):
    """Contradiction between a file and its name or format; the message is the reason."""


def checksum(data: memoryview | bytes) -> str:
    """Compute XXH3-128 of bytes, 32 hex digits: against accidents, no signature."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Tensor of a file: its name, dtype, shape, and bytes ``start:end`` of the data part."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Header:
    """Header of a document's file.

    Attributes:
        key: The document's key.
        fingerprint: Identity of the model that made it.
        codec: The codec of its rows.
        dtype: The rows' dtype when read.
        shape: ``(layers, kv_heads, n, head_dim)``.
        prefix_length: Tokens of the prefix that it was encoded behind.
        checksums: Per tensor.
        sensitivity: Whether it holds the sensitivities of its tokens.
        surrogate_lengths: Tokens of each text of its surrogate context; empty if it was encoded
            without.
    """

    key: str
    fingerprint: str
    codec: Codec
    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    prefix_length: int
    checksums: dict[str, str]
    sensitivity: bool = False
    surrogate_lengths: tuple[int, ...] = ()

    @property
    def version(self) -> int:
        """Return the file's format version."""
        return SURROGATE_VERSION if self.surrogate_lengths else FORMAT_VERSION

    def tensors(self) -> list[TensorEntry]:
        """Return all tensors in file order: ids, sensitivities, scales, then rows by layer."""
        layers, kv_heads, length, head_dim = self.shape
        stored = self.codec.dtype or self.dtype
        wanted: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
            ("token_ids", torch.int64, (length,)),
            ("prefix_ids", torch.int64, (self.prefix_length,)),
        ]
        if self.surrogate_lengths:
            wanted.append(("surrogate_ids", torch.int64, (sum(self.surrogate_lengths),)))
        if self.sensitivity:
            wanted.append(("sensitivity", torch.float32, (length,)))
        if not self.codec.exact:
            wanted += [
                (f"scales.{part}", torch.float32, (layers, kv_heads)) for part in ("keys", "values")
            ]
        wanted += [
            (layer_name(layer, part), stored, (kv_heads, length, head_dim))
            for layer in range(layers)
            for part in ("keys", "values")
        ]
        entries, end = [], 0
        for name, dtype, shape in wanted:
            start, end = end, end + math.prod(shape) * dtype.itemsize
            entries.append(TensorEntry(name, dtype, shape, start, end))
        return entries

    def encode(self) -> bytes:
        """Encode the file's head: length, JSON, padding."""
        metadata = {
            "format": FORMAT_NAME,
            "version": str(self.version),
            "key": self.key,
            "fingerprint": self.fingerprint,
            "codec": self.codec.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": json.dumps(list(self.shape)),
            "prefix_length": str(self.prefix_length),
            "checksums": json.dumps(self.checksums, sort_keys=True),
        }
        if self.sensitivity:  # absent otherwise, as in older files
            metadata["sensitivity"] = "true"
        if self.surrogate_lengths:
            metadata["surrogate_lengths"] = json.dumps(list(self.surrogate_lengths))
        metadata["seal"] = _seal(metadata)
        fields: dict[str, Any] = {"__metadata__": metadata}
        for entry in self.tensors():
            fields[entry.name] = {
                "dtype": DTYPE_NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [entry.start, entry.end],
            }
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def layer_name(layer: int, part: str) -> str:
    """Return the name of a layer's keys or values, such as ``layers.0007.keys``."""
    return f"layers.{layer:04d}.{part}"


def decode_header(text: bytes, data_bytes: int | None) -> Header:
    """Decode a header's JSON, and refuse it if a part contradicts the rest.

    Args:
        text: The JSON, padding included.
        data_bytes: Bytes of the file behind the header; None if not known yet.

    Returns:
        The header; the file holds its `Header.tensors`.

    Raises:
        FormatError: It is no header of this format and version.
    """
    try:
        fields = json.loads(text)
        metadata = fields["__metadata__"]
        found = {name: metadata[name] for name in ("format", "version")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"its header is not readable ({type(error).__name__})") from error
    if found["format"] != FORMAT_NAME:
        raise FormatError(f"its format is {str(found['format'])[:40]!r}, not {FORMAT_NAME!r}")
    if found["version"] not in (str(FORMAT_VERSION), str(SURROGATE_VERSION)):
        raise FormatError(
            f"its format version is {str(found['version'])[:20]!r} and this release of ifkv reads "
            f"versions {FORMAT_VERSION} and {SURROGATE_VERSION}; a newer ifkv may have written it"
        )
    try:
        seal = metadata.pop("seal")
        if not all(isinstance(value, str) for value in metadata.values()):
            raise FormatError("its metadata are not strings")
        if seal != _seal(metadata):
            raise FormatError("its metadata do not match their checksum")
        header = _header(metadata)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"its metadata are not readable ({type(error).__name__})") from error
    # Sizes first, before building the table of tensors: a header may claim billions of layers.
    layers, kv_heads, length, _ = header.shape
    width = (header.codec.dtype or header.dtype).itemsize
    scales = 0 if header.codec.exact else 2 * 4 * layers * kv_heads
    ids = 8 * (length + header.prefix_length + sum(header.surrogate_lengths))
    measured = 4 * length if header.sensitivity else 0
    expected = ids + measured + scales + 2 * math.prod(header.shape) * width
    if data_bytes is not None and expected != data_bytes:
        raise FormatError(f"it has {data_bytes} bytes of data and should have {expected}")
    metadata["seal"] = seal
    if 2 * layers > len(fields) or json.loads(header.encode()[8:]) != fields:
        raise FormatError("its header is not the one that its metadata call for")
    if header.checksums.keys() != {entry.name for entry in header.tensors()}:
        raise FormatError("its checksums are not one per tensor")
    return header


def _header(metadata: dict[str, str]) -> Header:
    shape = json.loads(metadata["shape"])
    sizes = (*shape, int(metadata["prefix_length"]))
    if len(shape) != 4 or not all(type(size) is int for size in sizes):
        raise FormatError("its shape is not four integers")
    if min(shape) < 1 or sizes[4] < 0 or max(sizes) >= 2**40:
        raise FormatError(f"its shape {str(shape)[:80]} is not possible")
    standing_in = json.loads(metadata.get("surrogate_lengths", "[]"))
    if not all(type(size) is int and 0 < size < 2**40 for size in standing_in):
        raise FormatError("the lengths of its surrogate context are not positive integers")
    checksums = json.loads(metadata["checksums"])
    if KEY_PATTERN.fullmatch(metadata["key"]) is None or not isinstance(checksums, dict):
        raise FormatError("its key or checksums are malformed")
    layers, kv_heads, length, head_dim = shape
    return Header(
        metadata["key"],
        metadata["fingerprint"],
        CODECS[metadata["codec"]],
        _ROW_DTYPES[metadata["dtype"]],
        (layers, kv_heads, length, head_dim),
        sizes[4],
        checksums,
        metadata.get("sensitivity") == "true",
        tuple(standing_in),
    )


def _seal(metadata: dict[str, str]) -> str:
    return checksum(json.dumps(metadata, sort_keys=True).encode())
