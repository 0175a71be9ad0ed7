"""A disk store never serves what it cannot vouch for, and says what it found."""

import errno
import os
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from ifkv.errors import (
    DocumentNotFoundError,
    InvalidInputError,
    StoreCorruptionError,
    StoreError,
    StoreFullError,
)
from ifkv.store import DiskStore, RemoteStore, key_of
from ifkv.testing import assert_bit_equal, random_document
from stored_documents import DOCUMENT, PREFIX, same


def test_the_file_is_plain_safetensors(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        assert metadata["format"] == "ifkv-document"
        assert metadata["version"] == "1"
        assert metadata["key"] == key_of(DOCUMENT)
        assert_bit_equal(opened.get_tensor("token_ids"), DOCUMENT.token_ids, what="tokens")
        assert_bit_equal(opened.get_tensor("prefix_ids"), PREFIX.token_ids, what="prefix")
        for layer in range(2):
            for part, rows in (("keys", DOCUMENT.keys), ("values", DOCUMENT.values)):
                name = f"layers.{layer:04d}.{part}"
                assert_bit_equal(opened.get_tensor(name), rows[layer], what=name)


def mutate(data: bytes, source: random.Random) -> bytes:
    """One accident: flipped bits, lost or doubled or foreign bytes, a cut or an extension."""
    changed = bytearray(data)
    # Half of the accidents hit the header, which is the smaller but more delicate part.
    span = len(data) if source.random() < 0.5 else 8 + int.from_bytes(data[:8], "little")
    at = source.randrange(span)
    kind = source.randrange(7)
    if kind <= 1:
        for _ in range(source.choice([1, 1, 1, 2, 8])):
            changed[source.randrange(span)] ^= 1 << source.randrange(8)
    elif kind == 2:
        del changed[at:]
    elif kind == 3:
        changed[at : at + 16] = source.randbytes(len(changed[at : at + 16]))
    elif kind == 4:
        del changed[at : at + source.randint(1, 64)]
    elif kind == 5:
        changed[at:at] = source.randbytes(source.randint(1, 64))
    else:
        changed[at : at + 512] = bytes(len(changed[at : at + 512]))
    return bytes(changed)


def test_mutated_files_are_never_served(
    store: DiskStore, file: Path, pytestconfig: pytest.Config
) -> None:
    rounds = 10_000 if pytestconfig.getoption("--profile") == "long" else 500
    source = random.Random(0 if rounds == 500 else None)
    good = file.read_bytes()
    key, refused, harmless = key_of(DOCUMENT), 0, 0
    for number in range(rounds):
        # Every file is a stranger: a new inode, unknown to what was verified before.
        other = file.with_suffix(".new")
        other.write_bytes(mutate(good, source))
        os.replace(other, file)
        if number % 10 == 0:  # the paths through recovery and the lazy reader are the same code
            store.close()
            store = DiskStore(store.path)
        try:
            same(store.get(key, lazy=number % 2 == 0), DOCUMENT)
            harmless += 1  # padding was hit, or bytes were replaced by equal ones
        except (StoreCorruptionError, DocumentNotFoundError):
            refused += 1
            assert key not in store
            store.put(DOCUMENT)
    assert refused > 0.9 * rounds
    assert refused + harmless == rounds
    same(store.get(key), DOCUMENT)
    assert len(store.folder.quarantine_files()) == 32  # evidence, within bounds


def test_corruption_is_named_set_aside_and_repaired_by_a_put(store: DiskStore, file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    key = key_of(DOCUMENT)
    with pytest.raises(StoreCorruptionError, match=r"layers.0001.values does not match") as caught:
        store.get(key)
    assert caught.value.key == key
    assert "Prefill it again" in str(caught.value)
    [aside] = store.folder.quarantine_files()
    assert aside.read_bytes() == bytes(data)
    reason = aside.with_name(aside.name + ".reason.txt").read_text()
    assert reason == "its tensor layers.0001.values does not match its checksum\n"
    assert store.stats().corrupt == 1
    with pytest.raises(DocumentNotFoundError):
        store.get(key)
    store.put(DOCUMENT)
    same(store.get(key), DOCUMENT)


def test_when_rows_are_checked(tmp_path: Path) -> None:
    key = key_of(DOCUMENT)

    def flip(file: Path) -> None:  # in place, and as if the clock had stood still
        status = file.stat()
        with file.open("r+b") as opened:
            opened.seek(-1, os.SEEK_END)
            last = opened.read(1)[0]
            opened.seek(-1, os.SEEK_END)
            opened.write(bytes([last ^ 1]))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    for verify, outcomes in (
        ("always", (True, False)),
        ("first", (True, True)),
        ("never", (True, True)),
    ):
        folder = tmp_path / verify
        with DiskStore(folder, verify=verify) as store:  # type: ignore[arg-type]
            store.put(DOCUMENT)
            served = []
            for _ in outcomes:
                try:
                    store.get(key)
                    served.append(True)
                except StoreCorruptionError:
                    served.append(False)
                if len(served) == 1:
                    flip(store.folder.file_of(key))
            assert tuple(served) == outcomes
        with DiskStore(folder, verify=verify) as store:  # type: ignore[arg-type]
            if verify == "first":
                with pytest.raises(StoreCorruptionError):
                    store.get(key)
    with pytest.raises(InvalidInputError, match="choose 'always'"):
        DiskStore(tmp_path, verify="sometimes")  # type: ignore[arg-type]


def test_verify_reads_everything(store: DiskStore, file: Path) -> None:
    assert store.verify() == []
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    [found] = store.verify()
    assert found.key == key_of(DOCUMENT)
    assert store.verify() == []


def test_links_and_special_files_are_not_followed(
    store: DiskStore, file: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    os.replace(file, outside)
    file.symlink_to(outside)
    with pytest.raises(StoreCorruptionError, match="symbolic link"):
        store.get(key_of(DOCUMENT))
    assert outside.exists()
    os.mkfifo(file)  # opening it for reading would block for ever
    store.close()
    with DiskStore(store.path) as again:
        assert key_of(DOCUMENT) not in again


def test_what_does_not_belong_among_the_documents_is_set_aside(store: DiskStore) -> None:
    strange = store.folder.documents / "zz"
    strange.mkdir()
    (strange / "evil.safetensors").write_bytes(b"")
    (store.folder.documents / "stray").write_text("")
    misplaced = store.folder.documents / "00" / f"{'1' * 64}.safetensors"
    misplaced.parent.mkdir(exist_ok=True)
    misplaced.write_text("")
    store.close()
    with DiskStore(store.path) as again:
        assert len(again) == 2
        assert len(again.folder.quarantine_files()) == 3
        again.prune()
        assert again.folder.quarantine_files() == []


def test_a_lost_or_damaged_index_is_made_anew(store: DiskStore) -> None:
    index = store.path / "index.sqlite3"
    for damage in (
        index.unlink,
        lambda: index.write_bytes(b"no database" * 1000),
        lambda: index.write_bytes(index.read_bytes()[:5000] + b"\xff" * 5000),
    ):
        store.close()
        damage()
        with DiskStore(store.path) as again:
            assert len(again) == 2
            same(again.get(key_of(DOCUMENT)), DOCUMENT)


def test_a_database_that_fails_later_says_so(store: DiskStore) -> None:
    store.close()
    with sqlite3.connect(store.path / "index.sqlite3") as connection:
        connection.execute("DROP TABLE documents")
    connection.close()
    with pytest.raises(StoreError, match="Open the store again"):
        DiskStore.stats(_without_schema(store))


def _without_schema(store: DiskStore) -> DiskStore:
    store.index._connection = sqlite3.connect(store.path / "index.sqlite3", isolation_level=None)
    store.index._process = os.getpid()
    return store


def test_a_lazy_document_outlives_its_eviction(store: DiskStore) -> None:
    document = store.get(key_of(DOCUMENT), lazy=True)
    store.delete(key_of(PREFIX))
    assert key_of(DOCUMENT) not in store
    same(document, DOCUMENT)


def test_a_lazy_document_that_is_cut_short_is_an_error(store: DiskStore, file: Path) -> None:
    document = store.get(key_of(DOCUMENT), lazy=True)
    os.truncate(file, file.stat().st_size - 10)  # under a mapping this would kill the process
    with pytest.raises(StoreCorruptionError, match="it ends at byte"):
        _ = document.values


@pytest.mark.parametrize(
    "after",
    range(11),  # 7 writes, sync, the shard's name, rename, sync
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_the_store_usable(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch, after: int, code: int
) -> None:
    """The n-th call that needs room on the disk fails, for every n."""
    calls = iter(range(1000))

    def failing(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if next(calls) == after:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    before = sorted(path.name for path in store.path.rglob("*.safetensors"))
    other = random_document(5, prefix=PREFIX)
    with monkeypatch.context() as patched:
        for name in ("write", "fsync", "replace"):
            patched.setattr(os, name, failing(getattr(os, name)))
        wanted = StoreError if code == errno.EIO else StoreFullError
        with pytest.raises(wanted) as caught:
            store.put(other)
    assert str(store.path) in str(caught.value)
    assert key_of(other) not in store
    assert sorted(path.name for path in store.path.rglob("*.safetensors")) == before
    assert list(store.folder.temporary.iterdir()) == []
    same(store.get(key_of(DOCUMENT)), DOCUMENT)
    store.put(other)
    same(store.get(key_of(other)), other)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Give a folder that can be written"):
        DiskStore(tmp_path / "file" / "store")


def test_a_folder_that_may_only_be_read(
    store: DiskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs the tests may write anywhere, so the system's answer is made up here."""
    store.close()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(StoreError, match=rf"may only be read.*URL.*: {tmp_path.as_uri()};"):
        DiskStore(tmp_path)
    for lazy in (False, True):
        same(RemoteStore(tmp_path.as_uri()).get(key_of(DOCUMENT), lazy=lazy), DOCUMENT)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("lazy", [False, True])
def test_remote_objects_are_checked(tmp_path: Path, lazy: bool) -> None:
    store = RemoteStore(tmp_path.as_uri())
    key = store.put(DOCUMENT)
    [file] = tmp_path.rglob(f"{key}*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    for bad in (bytes(data), bytes(data[:-1]), b""):
        file.write_bytes(bad)
        with pytest.raises(StoreCorruptionError):
            _ = store.get(key, lazy=lazy).keys
        assert key not in store
        store.put(DOCUMENT)
        same(store.get(key, lazy=lazy), DOCUMENT)
    assert store.stats().corrupt == 3
