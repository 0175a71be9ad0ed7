"""A session with a surrogate context: what it makes, finds, asks over, and makes again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import ifkv
from ifkv.cost import ModelShape
from ifkv.errors import InvalidInputError, StoreWarning
from ifkv.planning import Planner
from ifkv.selectors.registry import names
from ifkv.store import DiskStore, MemoryStore
from ifkv.testing import assert_bit_equal, assert_close, tiny_model, tiny_tokenizer
from rates import ROWS_COST

TEXTS = ["The lamp is red.", "The door is green and old.", "It rains in the valley."]
NOTES = ["Some notes of a traveller.", "What the weather was like."]
QUESTION = "Which colour is the door?"
TOKENIZER = tiny_tokenizer()


def make(surrogate: Any, store: Any = None, **options: Any) -> ifkv.Session:
    model = tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=600)
    store = MemoryStore() if store is None else store
    return ifkv.Session(model, TOKENIZER, store=store, surrogate=surrogate, **options)


@pytest.mark.parametrize("surrogate", [NOTES[0], NOTES])
def test_documents_are_those_of_prefill_documents_behind_these_texts(surrogate: Any) -> None:
    session = make(surrogate)
    keys = session.add(TEXTS)
    assert session.surrogate is not None
    texts = [surrogate] if isinstance(surrogate, str) else surrogate
    wanted = ifkv.prefill_documents(
        session.model,
        [session.format.document_ids(text) for text in TEXTS],
        attention_mask=None,
        prefix=session.prefix_ids,
        surrogate=[session.format.document_ids(text) for text in texts],
    )
    for key, document in zip(keys, wanted, strict=True):
        found = session.store.get(key)
        assert_close(found.keys, document.keys, what="keys", tolerance=1e-6)
        assert found.surrogate is not None
        assert document.surrogate is not None
        assert found.surrogate.identity == document.surrogate.identity
    assert not set(keys) & set(make(None).add(TEXTS))
    assert make(texts[::-1]).add(TEXTS) == keys
    assert repr(session.surrogate) in repr(session)
    assert copy.copy(session).add(TEXTS) == keys


def test_control_tokens_in_it_are_letters() -> None:
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    surrogate = make("He wrote <|im_end|> there.").surrogate
    assert surrogate is not None
    assert end not in surrogate.texts[0].tolist()


def test_everything_recomputed_is_a_full_prefill_and_the_first_may_be_chosen() -> None:
    session = make(NOTES)
    session.add(TEXTS)
    full = session.ask(QUESTION, ratio=1, max_new_tokens=4)
    assert full.slots.tolist() == list(range(len(session.prefix_ids), len(full.context_ids)))
    ids = torch.cat((full.context_ids, full.prompt_ids))[None]
    with torch.no_grad():
        native = session.model(ids).logits[0, -1]
    assert_close(full.first_logits, native.float(), what="first logits", tolerance=1e-5)
    some = session.ask(QUESTION, ratio=0.3, max_new_tokens=1)
    assert int(some.slots[0]) < some.document_slices[0].stop


def test_the_store_is_asked_over_by_what_the_session_is_behind(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        plain, behind, other = make(None, store), make(NOTES, store), make(NOTES[0], store)
        with pytest.raises(InvalidInputError, match="holds 0 entries"):
            behind.stored()
        own = plain.add(TEXTS[:2])
        with pytest.raises(
            InvalidInputError,
            match="2 documents that this model encoded behind this prefix, but none behind the "
            r"SurrogateContext\(.*: they were encoded without one",
        ):
            behind.stored()
        with_notes = behind.add(TEXTS)
        assert sorted(plain.stored()) == sorted(own)
        assert sorted(behind.stored()) == sorted(with_notes)
        for key in own:
            plain.store.delete(key)
        with pytest.raises(InvalidInputError, match=r"without a surrogate context.*behind another"):
            plain.stored()
        with pytest.raises(InvalidInputError, match="encode them anew"):
            other.stored()
        again = make(NOTES, store)
        assert again.add(TEXTS) == with_notes
        assert again.prefilled == 0


def test_by_key_documents_of_any_kind_may_be_asked_over_together() -> None:
    store = MemoryStore()
    plain, behind = make(None, store), make(NOTES, store)
    (alone,), (one, two) = plain.add(TEXTS[:1]), behind.add(TEXTS[1:])
    first = plain.ask(QUESTION, documents=[alone, one, two], ratio=1, max_new_tokens=1)
    assert int(first.slots[0]) == first.document_slices[1].start  # exact: it was encoded alone
    last = plain.ask(QUESTION, documents=[one, alone, two], ratio=1, max_new_tokens=1)
    assert int(last.slots[0]) == last.document_slices[0].start
    ids = torch.cat((last.context_ids, last.prompt_ids))[None]
    with torch.no_grad():
        native = plain.model(ids).logits[0, -1].float()
    assert_close(last.first_logits, native, what="first logits", tolerance=1e-5)


def damage(store: DiskStore, key: str) -> None:
    with store.folder.file_of(key).open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("asked_by", [None, NOTES[0], NOTES])
def test_a_damaged_document_is_made_again_behind_its_own_texts(
    tmp_path: Path, asked_by: Any
) -> None:
    """Also by a session that has not made it and is behind others."""
    with DiskStore(tmp_path, verify="always") as store:
        behind = make(NOTES, store)
        keys = behind.add(TEXTS)
        whole = store.get(keys[1])
        session = behind if asked_by == NOTES else make(asked_by, store)
        right = session.ask(QUESTION, documents=keys, max_new_tokens=1)
        damage(store, keys[1])
        with pytest.warns(StoreWarning, match="could not be trusted.*prefilled again"):
            answer = session.ask(QUESTION, documents=keys, max_new_tokens=1)
        assert_close(answer.first_logits, right.first_logits, what="logits", tolerance=1e-5)
        again = store.get(keys[1])
        assert_close(again.keys, whole.keys, what="keys", tolerance=1e-6)
        assert again.surrogate is not None
        store.delete(keys[2])
        with pytest.warns(StoreWarning, match="no longer in the store"):
            session.ask(QUESTION, documents=keys, max_new_tokens=1)
        assert keys[2] in store


def test_turns_batches_and_retrieval_go_through_it(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        session = make(NOTES, store)
        keys = session.add(TEXTS[:2])
        alone = [session.ask(QUESTION, documents=[key], max_new_tokens=2) for key in keys]
        many = session.ask_many([QUESTION] * 2, documents=[[keys[0]], [keys[1]]], max_new_tokens=2)
        for one, other in zip(alone, many, strict=True):
            assert one.slots.tolist() == other.slots.tolist()
            assert_close(one.first_logits, other.first_logits, what="logits", tolerance=1e-5)
        chat = session.conversation(keys[:1])
        chat.ask(QUESTION, ratio=1, max_new_tokens=2)
        chat.add(session.add(TEXTS[2:]))
        turn = chat.ask(QUESTION, ratio=1, max_new_tokens=2)
        ids = torch.cat((turn.context_ids, turn.prompt_ids))[None]
        with torch.no_grad():
            native = session.model(ids).logits[0, -1].float()
        assert_close(turn.first_logits, native, what="logits of a turn", tolerance=1e-5)
        assert session.retrieve("the green door", 1) == [keys[1]]


def test_sensitivities_are_made_and_kept_with_it() -> None:
    session = make(NOTES, selector="sensitivity-aware")
    keys = session.add(TEXTS)
    stored = [session.store.get(key).sensitivity for key in keys]
    session.ask(QUESTION, max_new_tokens=1)
    plain = make(NOTES)
    plain.add(TEXTS)
    measured = plain.ask(QUESTION, selector="sensitivity-aware", max_new_tokens=1)
    assert all(each is not None for each in stored)
    assert_bit_equal(
        measured.slots, session.ask(QUESTION, max_new_tokens=1).slots, what="selected slots"
    )


def test_a_plan_counts_the_first_document() -> None:
    plans = []
    for surrogate in (None, NOTES):
        session = make(surrogate)
        session = make(surrogate, planner=Planner(ModelShape.of(session.model), ROWS_COST))
        session.add(TEXTS[:2])
        plans.append(session.ask(QUESTION, ratio="auto", max_new_tokens=1).plan)
    plain, behind = plans
    assert plain is not None
    assert behind is not None
    assert plain.tokens == behind.tokens
    for one, other in zip(plain.forecasts, behind.forecasts, strict=True):
        assert other.bound > one.bound, "rows near the beginning see fewer keys"


@pytest.mark.parametrize(
    ("surrogate", "reason"),
    [
        ("", "a text of surrogate is blank; give a text, a list of texts, or None"),
        ([" \n"], "a text of surrogate is blank"),
        ([], "surrogate is an empty list"),
        ([1, 2], "a text of surrogate is of type int"),
        (b"bytes", "surrogate"),
        ({"a": 1}, "surrogate"),
        (5, "surrogate"),
        (["Twice.", "Twice."], "same text of 8 tokens twice"),
        (["Twice.", "Twice.\n"], "same text of 8 tokens twice"),
        ("long " * 120, r"a surrogate of 602 tokens, but .*Give a shorter text"),
    ],
)
def test_what_is_no_surrogate_is_refused(surrogate: Any, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        make(surrogate)


def test_a_document_too_long_behind_it_is_named_with_the_rule() -> None:
    session = make("long " * 80)
    with pytest.raises(
        InvalidInputError,
        match=r"document 1 \(202 tokens\) with its prefix and surrogate context.*split=512",
    ):
        session.add(["short", "words" * 40])
    make(None).add(["words" * 40])


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("count", [1, 3])
def test_every_selector_chooses_among_all_documents(name: str, count: int) -> None:
    session = make(NOTES)
    keys = session.add(TEXTS)[:count]
    answer = session.ask(QUESTION, documents=keys, selector=name, ratio=0.2, max_new_tokens=1)
    assert len(answer.slots) == int(0.2 * len(answer.context_ids))
    assert int(answer.slots[0]) >= len(session.prefix_ids)
