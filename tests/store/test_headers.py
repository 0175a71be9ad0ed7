"""Headers that were altered, and files that are no documents, are refused by a disk store."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ifkv.errors import (
    DocumentNotFoundError,
    StoreCorruptionError,
)
from ifkv.store import DiskStore, key_of
from ifkv.store.format import MAX_HEADER_BYTES, _seal
from ifkv.testing import random_document
from stored_documents import DOCUMENT, PREFIX


def rewrite_header(file: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def set_version(header: dict) -> None:  # type: ignore[type-arg]
    header["__metadata__"]["version"] = "3"


def set_surrogate_version(header: dict) -> None:  # type: ignore[type-arg]
    metadata = header["__metadata__"]
    del metadata["seal"]
    metadata["version"] = "2"
    metadata["seal"] = _seal(metadata)


def claim_surrogate(lengths: str) -> Callable[[dict[str, Any]], None]:
    """Names texts that are not in the file, under a seal that fits."""

    def change(header: dict[str, Any]) -> None:
        set_surrogate_version(header)
        metadata = header["__metadata__"]
        del metadata["seal"]
        metadata["surrogate_lengths"] = lengths
        metadata["seal"] = _seal(metadata)

    return change


def set_format(header: dict) -> None:  # type: ignore[type-arg]
    header["__metadata__"]["format"] = "pt"


def set_fingerprint(header: dict) -> None:  # type: ignore[type-arg]
    header["__metadata__"]["fingerprint"] = "1" * 32


def set_shape(header: dict) -> None:  # type: ignore[type-arg]
    header["__metadata__"]["shape"] = "[2, 4, 5, 2]"


def swap_layers(header: dict) -> None:  # type: ignore[type-arg]
    names = "layers.0000.keys", "layers.0001.keys"
    header[names[0]], header[names[1]] = header[names[1]], header[names[0]]


def set_sensitivity(word: str | None) -> Callable[[dict[str, Any]], None]:
    """Says something else of a tensor that is there, under a seal that fits."""

    def change(header: dict[str, Any]) -> None:
        metadata = header["__metadata__"]
        del metadata["seal"], metadata["sensitivity"]
        if word is not None:
            metadata["sensitivity"] = word
        metadata["seal"] = _seal(metadata)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_sensitivity(None), "bytes of data and should have"),
        (set_sensitivity("false"), "bytes of data and should have"),
        (lambda header: header.pop("sensitivity"), "not the one that its metadata call for"),
        (set_version, "format version is '3'.*newer ifkv"),
        (set_surrogate_version, "not the one that its metadata call for"),
        (claim_surrogate("[3]"), "bytes of data and should have"),
        (claim_surrogate("[]"), "not the one that its metadata call for"),
        (claim_surrogate("[0]"), "lengths of its surrogate context"),
        (claim_surrogate("[-3, true]"), "lengths of its surrogate context"),
        (claim_surrogate("3"), "metadata are not readable"),
        (set_format, "format is 'pt'"),
        (set_fingerprint, "do not match their checksum"),
        (set_shape, "do not match their checksum"),
        (swap_layers, "not the one that its metadata call for"),
        (lambda header: header.pop("__metadata__"), "header is not readable"),
    ],
)
def test_altered_headers(
    store: DiskStore, file: Path, change: Callable[..., object], reason: str
) -> None:
    rewrite_header(file, change)
    with pytest.raises(StoreCorruptionError, match=reason):
        store.get(key_of(DOCUMENT))


def test_a_renamed_file_is_refused(tmp_path: Path) -> None:
    """Another document, or another model's, under this document's name."""
    for number, other in enumerate(
        (random_document(1, prefix=PREFIX), random_document(0, prefix=None, fingerprint="1" * 32))
    ):
        with DiskStore(tmp_path / f"{number}") as store:
            store.put(DOCUMENT)
            store.put(other)
            target = store.folder.file_of(key_of(DOCUMENT))
            os.replace(store.folder.file_of(key_of(other)), target)
            with pytest.raises(StoreCorruptionError, match="another than its name says"):
                store.get(key_of(DOCUMENT))
            with pytest.raises(DocumentNotFoundError):
                store.get(key_of(other))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        (2**63).to_bytes(8, "little") + b"{}",
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 1),
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (6).to_bytes(8, "little") + b"[1, 2]",
        (5).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc\xfb",
        (6000).to_bytes(8, "little") + b"9" * 6000,
    ],
    ids=["empty", "short", "huge", "large", "deep", "list", "not-utf8", "long-number"],
)
def test_files_that_are_no_documents(store: DiskStore, file: Path, data: bytes) -> None:
    file.write_bytes(data)
    with pytest.raises(StoreCorruptionError):
        store.get(key_of(DOCUMENT))


def test_a_header_cannot_make_the_reader_allocate(store: DiskStore, file: Path) -> None:
    """Metadata with a good seal but a shape of billions: refused by the file's size."""
    from ifkv.store import format as layout

    def claim(header: dict) -> None:  # type: ignore[type-arg]
        metadata = header["__metadata__"]
        metadata.pop("seal")
        metadata["shape"] = json.dumps([2**30, 2**30, 5, 2**30])
        metadata["seal"] = layout.checksum(json.dumps(metadata, sort_keys=True).encode())

    rewrite_header(file, claim)
    with pytest.raises(StoreCorruptionError, match="bytes of data and should have"):
        store.get(key_of(DOCUMENT))
