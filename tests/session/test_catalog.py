"""Documents found in a store by where they are from, or by what a question asks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import ifkv
from ifkv import Source
from ifkv.errors import InvalidInputError
from ifkv.store import DiskStore, MemoryStore, TieredStore
from sourced import FERRY, TEXTS, TOKENIZER, make_session


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A store with three files' documents, one of them cut, and those of another prefix."""
    session = make_session(tmp_path)
    sources = [Source("lamp.md", "notes/lamp.md"), Source("ferry.md", "notes/ferry.md")]
    session.add([TEXTS[0], FERRY, TEXTS[1]], split=40, sources=[*sources, None])
    make_session(tmp_path, prefix="Other: ").add(["Nobody asks this."], sources=["notes/other.md"])
    return tmp_path


def texts_of(session: ifkv.Session, keys: list[str]) -> list[str]:
    return [TOKENIZER.decode(session.store.get(key).token_ids).strip() for key in keys]


def test_a_session_finds_what_a_store_holds_for_it(corpus: Path) -> None:
    session = make_session(corpus)
    ferry = [FERRY[:31].strip(), FERRY[31:].strip()]
    assert texts_of(session, session.stored()) == [*ferry, TEXTS[0], TEXTS[1]]
    assert texts_of(session, session.stored("notes/ferry*")) == ferry
    assert texts_of(session, session.stored("lamp.md")) == [TEXTS[0]]
    assert len(session.stored(["lamp.md", "*/ferry.md"])) == 3
    assert len(session.stored("ferry.md:5 (2 of 2)")) == 1
    answer = session.ask("Which?", documents=session.stored("notes/*"), max_new_tokens=2)
    assert len(answer.sources) == 3
    assert all(answer.sources)


def test_stores_of_other_kinds_are_gone_through(corpus: Path) -> None:
    kept = MemoryStore()
    session = make_session(kept)
    keys = session.add(TEXTS, sources=["a.md", "b.md", None])
    make_session(kept, prefix="Other: ").add(["Nobody asks this."])
    assert session.stored() == [*keys[:2], keys[2]]
    assert session.stored("b*") == keys[1:2]
    tiers = TieredStore(MemoryStore(), TieredStore(MemoryStore(), DiskStore(corpus)))
    assert len(make_session(tiers).stored()) == 4


def test_the_slowest_tier_that_can_keeps_sources(tmp_path: Path) -> None:
    near, back = DiskStore(tmp_path / "near"), DiskStore(tmp_path / "back")
    (key,) = make_session(TieredStore(near, MemoryStore())).add(TEXTS[:1], sources=["a.md"])
    assert near.sources() == {key: [Source("a.md")]}
    make_session(TieredStore(near, back)).add(TEXTS[:1], sources=["b.md"])
    assert back.sources() == {key: [Source("b.md")]}
    assert near.sources() == {key: [Source("a.md")]}


def test_a_prefix_of_no_tokens_has_documents_too(tmp_path: Path) -> None:
    session = make_session(tmp_path, prefix=[])
    keys = session.add(TEXTS[:2], sources=["a.md", "b.md"])
    assert session.stored() == keys


def test_what_is_not_there_is_said_with_what_is(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInputError, match=r"matches 'x\*'; there are notes/ferry.md, notes/l"
    ):
        make_session(corpus).stored(["lamp.md", "x*"])
    with pytest.raises(InvalidInputError, match="holds 7 entries, and none is a document that"):
        make_session(corpus, prefix="Third: ").stored()
    with pytest.raises(InvalidInputError, match="holds 0 entries"):
        make_session(tmp_path / "new").stored()
    untitled = make_session(MemoryStore())
    untitled.add(TEXTS)
    with pytest.raises(InvalidInputError, match="nobody has said where the 3 documents"):
        untitled.stored("a*")


@pytest.mark.parametrize("only", [[], "", ["a.md", ""], [3], 3, {"a.md"}, {"a.md": 1}])
def test_a_pattern_that_is_none_is_refused(corpus: Path, only: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^only is "):
        make_session(corpus).stored(only)


# Retrieving


def test_the_best_fitting_documents_come_last() -> None:
    session = make_session(MemoryStore())
    lamp, door, rain = session.add(TEXTS)
    assert session.retrieve("Is the DOOR green, or the lamp?", 2) == [lamp, door]
    assert session.retrieve("the lamp, the red lamp", 3) == [door, lamp]
    assert session.retrieve("rains", 3) == [rain]
    assert session.retrieve("It is green, it rains", 2, documents=[lamp, rain]) == [lamp, rain]
    assert session.retrieve("red", 9, documents=[lamp, lamp]) == [lamp]
    assert session.retrieve("red", 9, documents=[session.add(["?!"])[0], lamp]) == [lamp]
    (later,) = session.add(["A late door, green, green."])
    assert session.retrieve("green door", 1) == [later], "an index of before was searched"


@pytest.mark.parametrize(
    ("question", "count", "words"),
    [
        ("Who?", 2, "none of the 3 documents has a word of the question 'Who"),
        ("?!", 2, "none of the 3"),
        (" ", 2, "the question is ' '"),
        (None, 2, "the question is None"),
        ("the lamp", 1.5, "number of documents to retrieve is 1.5"),
        ("the lamp", 0, "number of documents to retrieve is 0"),
    ],
)
def test_nothing_found_is_nothing_to_answer_from(question: Any, count: Any, words: str) -> None:
    session = make_session(MemoryStore())
    session.add(TEXTS)
    with pytest.raises(InvalidInputError, match=words):
        session.retrieve(question, count)


def test_without_bm25s_retrieving_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    session = make_session(MemoryStore())
    session.add(TEXTS)
    with pytest.raises(InvalidInputError, match=r"pip install bm25s"):
        session.retrieve("lamp", 1)
