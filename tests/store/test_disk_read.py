"""Files that the system does not read stay where they are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ifkv.errors import StoreUnavailableError
from ifkv.store import DiskStore
from ifkv.testing import assert_bit_equal
from stored_documents import DOCUMENT, same


def test_a_disk_that_does_not_read_is_no_evidence_against_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files, for instance; nothing is set aside for it, here or at the next open."""
    with DiskStore(tmp_path) as disk:
        key = disk.put(DOCUMENT)
        file = disk.folder.file_of(key)
        real = os.open

        def full(path: Any, *arguments: Any, **options: Any) -> int:
            if str(path).endswith(".safetensors"):
                raise OSError(24, "Too many open files")
            return real(path, *arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(os, "open", full)
            with pytest.raises(StoreUnavailableError, match=r"Too many open files.*left where"):
                disk.get(key)
            [first, *_] = disk.verify()
            assert isinstance(first, StoreUnavailableError)
        assert file.exists()
        same(disk.get(key), DOCUMENT)
    (tmp_path / "index.sqlite3").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", full)
        DiskStore(tmp_path).close()
    with DiskStore(tmp_path) as disk:
        same(disk.get(key), DOCUMENT)
        assert disk.folder.quarantine_files() == []
        assert_bit_equal(disk.get(key).keys, DOCUMENT.keys, what="keys")
