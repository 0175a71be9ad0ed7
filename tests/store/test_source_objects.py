"""Where a far store's documents are from: objects that nobody rewrites."""

from __future__ import annotations

from pathlib import Path

import pytest

import ifkv
from ifkv import Source
from ifkv.errors import StoreError
from ifkv.store import DiskStore, MemoryStore, RemoteStore, TieredStore
from ifkv.store.format import checksum
from ifkv.testing import tiny_model, tiny_tokenizer

TEXTS = ["The lamp is red.", "The door is green.", "It rains."]
KEYS = [f"{number:064x}" for number in range(3)]
LAMP, DOOR = Source("lamp.md", "notes/lamp.md"), Source("door.md")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return (tmp_path / "far").as_uri()


def objects(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "far" / "sources").glob("*"))


def test_sources_are_there_for_whoever_opens_the_store(url: str, tmp_path: Path) -> None:
    one, other = RemoteStore(url), RemoteStore(url)
    assert one.sources() == other.sources() == {}
    one.add_sources([(KEYS[0], LAMP), (KEYS[1], DOOR), (KEYS[0], LAMP)])
    one.add_sources([(KEYS[0], LAMP)])
    assert len(objects(tmp_path)) == 1, "what was there was written again"
    other.add_sources([(KEYS[0], DOOR)])
    for store in (one, other, RemoteStore(url)):
        found = store.sources()
        assert set(found[KEYS[0]]) == {LAMP, DOOR}
        assert found[KEYS[1]] == [DOOR]
        assert store.sources([KEYS[1], KEYS[2]]) == {KEYS[1]: [DOOR]}
    assert len(objects(tmp_path)) == 2


def test_a_damaged_object_of_sources_is_said_and_spoils_no_answer(url: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    session = ifkv.Session(model, tokenizer, store=RemoteStore(url))
    keys = session.add(TEXTS[:2], sources=[LAMP, DOOR])
    (path,) = objects(tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    other = ifkv.Session(model, tokenizer, store=RemoteStore(url))
    assert other.ask("Which?", documents=keys, max_new_tokens=1).sources == [None, None]
    with pytest.raises(StoreError, match="have arrived damaged; try again"):
        RemoteStore(url).sources()
    assert path.exists(), "a network may have made the damage"


@pytest.mark.parametrize("data", [b"{", b"3", b"[[1]]", b'[["a", "{}"]]', b'[["a", 3]]', b"\xff"])
def test_an_object_that_holds_no_sources_is_an_error_in_words(
    url: str, tmp_path: Path, data: bytes
) -> None:
    (tmp_path / "far" / "sources").mkdir(parents=True)
    (tmp_path / "far" / "sources" / f"{checksum(data)}.json").write_bytes(data)
    with pytest.raises(StoreError, match=r"holds no sources .* remove that object"):
        RemoteStore(url).sources()


def test_a_far_corpus_is_asked_over_by_name(url: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    keys = ifkv.Session(model, tokenizer, store=url).add(TEXTS, sources=[LAMP, DOOR, None])
    near = TieredStore(MemoryStore(), TieredStore(DiskStore(tmp_path / "near"), RemoteStore(url)))
    for store in (RemoteStore(url), near):
        session = ifkv.Session(model, tokenizer, store=store)
        assert session.stored() == [keys[1], keys[0], keys[2]]
        assert session.stored("notes/*") == [keys[0]]
        answer = session.ask("Which?", documents=session.stored("door*"), max_new_tokens=1)
        assert answer.sources == [DOOR]
