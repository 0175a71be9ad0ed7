"""Where documents are from: kept beside them, outside their keys, and handed back."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from ifkv import Source
from ifkv.errors import InvalidInputError, StoreError, StoreWarning
from ifkv.store import DiskStore, MemoryStore
from sourced import FERRY, TEXTS, make_session


def test_an_answer_says_where_its_documents_are_from() -> None:
    session = make_session(MemoryStore())
    lamp = Source("The lamp", "notes/lamp.md", page=3)
    keys = session.add(TEXTS, sources=[lamp, "door.md", None])
    for documents in (keys, keys[::-1], [keys[2]]):
        answer = session.ask("Which?", documents=documents, max_new_tokens=2)
        expected = dict(zip(keys, [lamp, Source("door.md"), None], strict=True))
        assert answer.sources == [expected[key] for key in documents]
    assert session.ask("Which?", max_new_tokens=2, reorder=True).sources == [
        lamp,
        Source("door.md"),
        None,
    ]
    stream = session.stream("Which?", max_new_tokens=2)
    list(stream)
    assert stream.answer.sources[0] == lamp


def test_the_page_of_an_answer_names_its_documents() -> None:
    session = make_session(MemoryStore())
    session.add(TEXTS, sources=[Source("<The> lamp"), "door.md", None])
    page = session.ask("Which?", ratio=0.5, max_new_tokens=2).to_html()
    assert "&lt;The&gt; lamp" in page
    assert "door.md" in page
    assert "It rains." in page
    named = session.ask("Which?", max_new_tokens=2).to_html(titles=["One", "Two", "Three"])
    assert "Two" in named
    assert "door.md" not in named


def test_batches_and_conversations_say_it_too() -> None:
    session = make_session(MemoryStore())
    lamp, door, rain = session.add(TEXTS, sources=["lamp.md", "door.md", "rain.md"])
    answers = session.ask_many(["One?", "Two?"], documents=[[door], [rain, lamp]], max_new_tokens=2)
    assert [list(map(str, answer.sources)) for answer in answers] == [
        ["door.md"],
        ["rain.md", "lamp.md"],
    ]
    talk = session.conversation([lamp])
    assert list(map(str, talk.ask("Which?", max_new_tokens=2).sources)) == ["lamp.md"]
    talk.add([rain])
    second = talk.ask("And?", max_new_tokens=2)
    assert list(map(str, second.sources)) == ["lamp.md", "rain.md"]
    assert len(second.sources) == len(second.document_slices)
    assert len(talk.ask("And now?", max_new_tokens=2).sources) == 2


def test_sources_are_no_part_of_a_key_and_one_text_may_have_several(tmp_path: Path) -> None:
    first = make_session(tmp_path)
    (plain,) = first.add(TEXTS[:1])
    assert first.sources() == {plain: []}
    assert first.add(TEXTS[:1], sources=["a.md"]) == [plain]
    assert first.add([TEXTS[0], TEXTS[0]], sources=["b.md", "a.md"]) == [plain, plain]
    assert first.sources() == {plain: [Source("a.md"), Source("b.md")]}
    assert first.prefilled == 1
    # Another session finds them in the store, behind what it was told itself.
    other = make_session(tmp_path)
    other.add(TEXTS[:1], sources=["c.md"])
    assert other.sources()[plain] == [Source("c.md"), Source("a.md"), Source("b.md")]
    assert str(other.ask("Which?", max_new_tokens=1).sources[0]) == "c.md"


def test_pieces_say_where_they_begin(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    source = Source("ferry.md", "notes/ferry.md")
    keys = session.add([FERRY, TEXTS[0]], split=40, sources=[source, "lamp.md"])
    found = [session.sources()[key][0] for key in keys]
    assert [str(each) for each in found] == [
        "ferry.md:1 (1 of 2)",
        "ferry.md:5 (2 of 2)",
        "lamp.md",
    ]
    assert [each.offset for each in found] == [0, FERRY.index("It takes"), None]
    assert {each.location for each in found[:2]} == {"notes/ferry.md"}
    assert found[1].place == "notes/ferry.md:5"
    # A line of a JSONL file stays that line.
    keys = session.add([FERRY], split=40, sources=[Source("x.jsonl", line=7)])
    assert str(session.sources(keys)[keys[1]][-1]) == "x.jsonl:7 (2 of 2)"


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (["a.md"], "sources has 1 entries for 3 texts"),
        ("a.md", "sources is one string"),
        (Source("a.md"), "sources is Source"),
        ({"a.md": 1}, "only the names"),
        (["a.md", 3, None], r"sources\[1\] is of type int"),
        (["a.md", "", None], "neither title nor location"),
    ],
)
def test_sources_that_are_none_are_refused_before_any_work(sources: Any, words: str) -> None:
    session = make_session(MemoryStore())
    with pytest.raises(InvalidInputError, match=words):
        session.add(TEXTS, sources=sources)
    assert not len(session.store)


@pytest.mark.parametrize(
    "fields", [{}, {"title": 3}, {"title": "a", "page": 0}, {"title": "a", "line": True}]
)
def test_a_source_that_says_nothing_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        Source(**fields)


def test_a_source_survives_its_text() -> None:
    for source in (
        Source("é\n\x1b[2J\udcff"),
        Source("a", "b", 1, 2, 0, (1, 2)),
        Source(location="x"),
    ):
        assert Source.from_json(source.to_json()) == source
    for text in (
        "[]",
        "{",
        "3",
        '{"title": 3}',
        '{"title": "a", "x": 1}',
        '{"part": [1], "title": "a"}',
    ):
        with pytest.raises(ValueError):
            Source.from_json(text)


def test_sources_stay_through_eviction_and_leave_with_the_document(tmp_path: Path) -> None:
    names = ["a.md", "b.md", "c.md"]
    with DiskStore(tmp_path) as store:
        session = make_session(store)
        keys = session.add(TEXTS, sources=names)
        store.max_bytes = store.stats().nbytes
        session.add(["Something else."])
        assert keys[0] not in store
        store.max_bytes = None
        with pytest.warns(StoreWarning, match="prefilled again"):
            session.ask("Which?", documents=keys, max_new_tokens=1)
        assert [str(store.sources(keys)[key][0]) for key in keys] == names
        store.delete(keys[0])
        assert set(store.sources()) == set(keys[1:])
        store.prune(0)
        assert store.sources() == {}


def test_an_index_of_an_earlier_release_gets_sources(tmp_path: Path) -> None:
    (key,) = make_session(tmp_path).add(TEXTS[:1])
    with sqlite3.connect(tmp_path / "index.sqlite3") as db:
        db.execute("DROP TABLE sources")
    session = make_session(tmp_path)
    assert session.add(TEXTS[:1], sources=["a.md"]) == [key]
    assert session.prefilled == 0
    with DiskStore(tmp_path) as store:
        assert store.sources() == {key: [Source("a.md")]}


def test_a_source_that_cannot_be_read_spoils_no_answer(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    (key,) = session.add(TEXTS[:1], sources=["a.md"])
    with sqlite3.connect(tmp_path / "index.sqlite3") as db:
        db.execute("UPDATE sources SET source = '{'")
    other = make_session(tmp_path)
    assert other.ask("Which?", documents=[key], max_new_tokens=1).sources == [None]
    with pytest.raises(StoreError, match="cannot be read"):
        other.sources([key])


def test_a_store_that_cannot_keep_sources_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StoreError("the disk is full")

    session = make_session(tmp_path)
    monkeypatch.setattr(DiskStore, "add_sources", refuse)
    with pytest.warns(StoreWarning, match="known to this session only: the disk is full"):
        (key,) = session.add(TEXTS[:1], sources=["a.md"])
    assert session.ask("Which?", max_new_tokens=1).sources == [Source("a.md")]
    assert session.sources() == {key: [Source("a.md")]}


def test_threads_add_sources_side_by_side(tmp_path: Path) -> None:
    make_session(tmp_path).add(TEXTS)
    failures: list[BaseException] = []

    def add(name: str) -> None:
        try:
            with DiskStore(tmp_path) as store:
                store.add_sources([(f"{n:064x}", Source(f"{name}{n}.md")) for n in range(20)])
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=add, args=(name,)) for name in "aabb"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with DiskStore(tmp_path) as store:
        found = store.sources()
    assert len(found) == 20
    assert all(len(each) == 2 for each in found.values())
