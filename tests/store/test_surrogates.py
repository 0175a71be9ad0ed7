"""Documents behind a surrogate context in a store: their files, and the index."""

import hashlib
import json
import sqlite3
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import ifkv
from ifkv.errors import StoreCorruptionError
from ifkv.store import DiskStore, key_of
from ifkv.store.codecs import resolve_codec
from ifkv.store.document_file import DocumentFile
from ifkv.testing import random_document
from stored_documents import BEHIND, DOCUMENT, PREFIX, SURROGATE, same


def test_without_one_keys_and_files_are_those_of_version_1() -> None:
    assert key_of(DOCUMENT) == "7f41ba45a1ee4fed55cba977743e37cdb34db3bb888cacd85387932bdc52a643"
    assert key_of(PREFIX) == "11b20cbc33ed77de453552b392aa953f9974629e064e6e01be5e04a4ae1c119c"
    for codec, wanted in (
        ("exact", "0e30521eb4e018138a420cc51488c886f431c145537a1d5f45816932e26f4464"),
        ("int8", "d7fc8464f8abdc3b6528dae5ebb036caddffb168673f1f309c189d372126c8e9"),
    ):
        data = DocumentFile(DOCUMENT, resolve_codec(codec)).tobytes()
        assert hashlib.sha256(data).hexdigest() == wanted


def test_a_file_says_all_that_decides_its_rows(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        file = store.folder.file_of(store.put(BEHIND))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        assert metadata["version"] == "2"
        assert json.loads(metadata["surrogate_lengths"]) == [2, 1]
        assert opened.get_tensor("surrogate_ids").tolist() == [4, 5, 6]
        assert list(opened.offset_keys())[:3] == ["token_ids", "prefix_ids", "surrogate_ids"]


@pytest.mark.parametrize("codec", ["exact", "int8", "fp8"])
def test_a_surrogate_context_comes_back_as_one_object(tmp_path: Path, codec: str) -> None:
    second = random_document(2, prefix=PREFIX, surrogate=SURROGATE)
    with DiskStore(tmp_path, codec=codec) as store:
        keys = [store.put(document) for document in (BEHIND, second)]
    with DiskStore(tmp_path, codec=codec) as store:
        found = [store.get(keys[0], lazy=True), store.get(keys[1])]
        assert found[0].surrogate is found[1].surrogate is not None
        assert found[0].surrogate.identity == SURROGATE.identity
        assert found[0].prefix is not None
        assert found[0].prefix.surrogate is None
        assert repr(found[1].surrogate) == repr(SURROGATE)
        if codec == "exact":
            same(found[0], BEHIND)


def test_other_texts_under_a_document_s_name_are_refused(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        key = store.put(BEHIND)
        file = store.folder.file_of(key)
        one = ifkv.SurrogateContext((torch.tensor([4, 5]), torch.tensor([7])))
        other = DocumentFile(BEHIND.rebuilt(surrogate=one), store.codec)
        file.write_bytes(other.tobytes())
        with pytest.raises(StoreCorruptionError, match="another than its name says"):
            store.get(key)


def test_texts_out_of_order_are_refused(tmp_path: Path) -> None:
    """They would be another identity of the same texts."""
    with DiskStore(tmp_path) as store:
        key = store.put(BEHIND)
        twisted = ifkv.SurrogateContext(SURROGATE.texts)
        object.__setattr__(twisted, "texts", SURROGATE.texts[::-1])
        data = DocumentFile(BEHIND.rebuilt(surrogate=twisted), store.codec).tobytes()
        store.folder.file_of(key).write_bytes(data)
        with pytest.raises(StoreCorruptionError, match="surrogate context is none"):
            store.get(key)


def test_the_index_knows_it_also_when_it_is_made_anew(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        for document in (DOCUMENT, BEHIND):
            store.put(document)
    (tmp_path / "index.sqlite3").unlink()
    with DiskStore(tmp_path) as store:
        found = {entry.key: entry.surrogate for entry in store.entries()}
        assert store.verify() == []
    assert found == {
        key_of(DOCUMENT): None,
        key_of(BEHIND): SURROGATE.identity,
        key_of(PREFIX): None,
    }


def test_an_index_of_an_older_release_is_taken_over(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        store.put(DOCUMENT)
        store.pin(key_of(DOCUMENT))
    database = sqlite3.connect(tmp_path / "index.sqlite3")
    database.execute("ALTER TABLE documents DROP COLUMN surrogate")
    database.close()
    with DiskStore(tmp_path) as store:
        store.put(BEHIND)
        found = {entry.key: (entry.surrogate, bool(entry.pinned)) for entry in store.entries()}
    assert found[key_of(DOCUMENT)] == (None, True)
    assert found[key_of(BEHIND)] == (SURROGATE.identity, False)
