"""Copies of sessions, conversations and stores: whole, or refused in a sentence."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ifkv
from ifkv.errors import InvalidInputError
from ifkv.store import DiskStore, MemoryStore, RemoteStore, TieredStore
from ifkv.testing import tiny_model, tiny_tokenizer

TEXTS = ["The lamp is red.", "The door is green."]


@pytest.fixture
def session() -> ifkv.Session:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048)
    made = ifkv.Session(model, tokenizer, store=MemoryStore())
    made.add(TEXTS[:1])
    return made


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_what_holds_a_model_or_a_store_is_refused(
    session: ifkv.Session, tmp_path: Path, copied: Callable[[Any], Any]
) -> None:
    memory, disk = MemoryStore(), DiskStore(tmp_path)
    cases: dict[str, Any] = {
        r"ifkv\.Session\(model, tokenizer, store=path\)": session,
        r"copy\.copy\(conversation\) goes on": session.conversation(),
        "read it once": session.stream("Which?"),
        "share it": memory,
        r"DiskStore\(path\)": disk,
        r"TieredStore\(MemoryStore": TieredStore(memory, disk),
        r"RemoteStore\(url\)": RemoteStore("memory://copies"),
    }
    for instead, value in cases.items():
        name = type(value).__name__
        with pytest.raises(InvalidInputError, match=rf"^a {name} can be neither .*{instead}"):
            copied(value)
        with pytest.raises(InvalidInputError, match="neither pickled nor copied"):
            copied([value])


def test_a_store_is_not_copied_either(tmp_path: Path) -> None:
    """Two with one budget between them would each count for themselves."""
    for store in (MemoryStore(), DiskStore(tmp_path)):
        with pytest.raises(InvalidInputError, match="neither pickled nor copied"):
            copy.copy(store)


def test_a_copied_session_has_a_list_of_documents_of_its_own(session: ifkv.Session) -> None:
    twin = copy.copy(session)
    assert twin.keys == session.keys
    assert (twin.model, twin.store) == (session.model, session.store)
    twin.add(TEXTS[1:])
    assert len(session.keys) == 1
    assert len(twin.keys) == 2
    expected = session.ask("Which?", max_new_tokens=4).token_ids.tolist()
    given = twin.ask("Which?", documents=session.keys, max_new_tokens=4)
    assert given.token_ids.tolist() == expected
    assert len(session.ask("Which?", max_new_tokens=1).document_slices) == 1


def test_a_copied_conversation_goes_on_by_itself(session: ifkv.Session) -> None:
    def ask(chat: Any, *questions: str) -> list[list[int]]:
        return [chat.ask(each, max_new_tokens=4).token_ids.tolist() for each in questions]

    (door,) = session.add(TEXTS[1:])
    chat = session.conversation()
    ask(chat, "Which?")
    fork = copy.copy(chat)
    fork.add([door])
    forked = ask(fork, "And the door?", "Why?")
    kept = ask(chat, "Red?", "Why?")
    assert len(chat.answers) == len(fork.answers) == 3
    again = session.conversation()
    assert ask(again, "Which?", "Red?", "Why?")[1:] == kept
    other = session.conversation()
    ask(other, "Which?")
    other.add([door])
    assert ask(other, "And the door?", "Why?") == forked


def test_answers_are_copied_and_pickled(session: ifkv.Session) -> None:
    answer = session.ask("Which?", max_new_tokens=3)
    for twin in (copy.deepcopy(answer), through_pickle(answer)):
        assert (twin.text, twin.finish_reason) == (answer.text, answer.finish_reason)
