"""A model is checked once at the door of a request, and again at the next one's."""

from collections import Counter
from typing import Any

import pytest
import torch

import ifkv
from ifkv.errors import FingerprintMismatchError, UnsupportedModelError
from ifkv.models.fingerprint import FingerprintCache
from ifkv.patching import handle, handle_of
from ifkv.patching.handle import checked_once
from ifkv.store import MemoryStore
from ifkv.testing import tiny_model, tiny_tokenizer

QUESTION = "Which colour is the lamp?"


@pytest.fixture
def session() -> ifkv.Session:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048)
    made = ifkv.Session(model, tokenizer, store=MemoryStore())
    made.add(["The lamp is red.", "The door is green."])
    return made


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a model's modules and its weights are looked at."""
    counts: Counter[str] = Counter()
    check, of = handle.check_mode, FingerprintCache.of

    def checked(model: Any) -> None:
        counts["modules"] += 1
        check(model)

    def taken(self: FingerprintCache, model: Any, *, sample: bool = True) -> str:
        counts["weights"] += 1
        return of(self, model, sample=sample)

    monkeypatch.setattr(handle, "check_mode", checked)
    monkeypatch.setattr(FingerprintCache, "of", taken)
    return counts


@pytest.mark.parametrize("how", [{}, {"reorder": True}, {"do_sample": True}], ids=str)
def test_a_question_looks_at_its_model_once(
    session: ifkv.Session, looks: Counter[str], how: Any
) -> None:
    session.ask(QUESTION, max_new_tokens=6, **how)
    assert looks["modules"] <= 2, "at the door, and when settings are checked"
    assert looks["weights"] <= 2, "where they lie, and their numbers behind the rows"
    looks.clear()
    session.ask_many([QUESTION] * 3, max_new_tokens=6, **how)
    assert looks["modules"] <= 2
    assert looks["weights"] <= 2


def test_a_turn_looks_at_its_model_once(session: ifkv.Session, looks: Counter[str]) -> None:
    chat = session.conversation()
    for _ in range(2):
        looks.clear()
        chat.ask(QUESTION, max_new_tokens=6)
        assert looks["modules"] <= 3
        assert looks["weights"] <= 2


def test_every_request_looks_anew(session: ifkv.Session) -> None:
    session.ask(QUESTION, max_new_tokens=1)
    with torch.no_grad():
        session.model.model.layers[0].mlp.up_proj.weight += 1
    with pytest.raises(FingerprintMismatchError):
        session.ask(QUESTION, documents=session.keys, max_new_tokens=1)
    session.model.train()
    with pytest.raises(UnsupportedModelError, match="training mode"):
        session.ask(QUESTION, max_new_tokens=1)


@pytest.mark.parametrize("how", [{}, {"do_sample": True}], ids=str)
def test_what_was_prepared_by_other_weights_is_not_answered(
    session: ifkv.Session, how: Any
) -> None:
    ready = session.prepare(QUESTION)
    with torch.no_grad():
        session.model.model.layers[0].mlp.up_proj.weight += 1
    with pytest.raises(FingerprintMismatchError):
        session.complete(ready, max_new_tokens=2, **how)


def test_blocks_nest_and_are_of_one_model_each(looks: Counter[str]) -> None:
    one, other = tiny_model("llama"), tiny_model("llama", seed=1)
    with ifkv.patch(one), ifkv.patch(other):
        looks.clear()
        with checked_once(one) as outer, checked_once(one) as inner:
            assert inner is outer is handle_of(one)
            assert looks["modules"] == 1
            handle_of(other)
            assert looks["modules"] == 2
            other_identity = handle_of(other).identity(other)
            assert outer.identity(one) == outer.identity(one) != other_identity
            assert looks["weights"] == 2
        handle_of(one)
        assert looks["modules"] > 2
