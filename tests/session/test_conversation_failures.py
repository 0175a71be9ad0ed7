"""A turn that cannot be, or that fails, changes nothing; what is damaged is made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ifkv
from conversing import (
    EXACT,
    TEXTS,
    assert_unchanged,
    make_session,
    own_logits,
    state,
)
from ifkv.errors import FingerprintMismatchError, InvalidInputError, NotPatchedError, StoreWarning
from ifkv.store import DiskStore
from ifkv.testing import assert_close


@pytest.fixture
def session() -> ifkv.Session:
    return make_session()


@pytest.mark.parametrize("turn", ["first", "later", "with documents", "revisiting", "in 8 bits"])
@pytest.mark.parametrize("failing", ["stream", "pass 1", "pass 2", "pass 4", "iterator"])
def test_a_turn_that_fails_changes_nothing(turn: str, failing: str) -> None:
    session = make_session(kv_dtype=torch.float8_e4m3fn if turn == "in 8 bits" else None)
    lamp, door, rain, hill = session.add(TEXTS)
    chat, twin = session.conversation([lamp, door, rain]), session.conversation([lamp, door, rain])
    options: dict[str, Any] = {"ratio": 0.3, "max_new_tokens": 6}
    if turn != "first":
        for each in (chat, twin):
            each.ask("Red?", **options)
    if turn in ("with documents", "in 8 bits"):
        chat.add([hill])
        twin.add([hill])
    options["revisit"] = turn in ("revisiting", "in 8 bits")
    before = state(chat)
    base: Any = session.model.base_model
    passes = []
    last = int(failing[-1]) if failing.startswith("pass") else 4

    def fail(*_: Any) -> None:
        passes.append(1)
        if len(passes) >= last:
            raise KeyboardInterrupt

    def refuse(_: str) -> None:
        raise KeyboardInterrupt

    def ask() -> None:
        if failing == "stream":
            chat.ask("Old?", stream=refuse, **options)
        elif failing.startswith("pass"):
            chat.ask("Old?", **options)
        else:
            list(chat.stream("Old?", **options))

    hook = None
    if failing != "stream":
        hook = base.layers[1].register_forward_pre_hook(ifkv.observer(fail))
    with pytest.raises(KeyboardInterrupt):
        ask()
    if hook is not None:
        hook.remove()
    assert_unchanged(chat, before)
    assert len(chat.answers) == len(twin.answers)
    again, expected = chat.ask("Old?", **options), twin.ask("Old?", **options)
    assert torch.equal(again.token_ids, expected.token_ids)
    assert torch.equal(again.slots, expected.slots)
    assert_close(again.first_logits, expected.first_logits, what="logits", tolerance=1e-12)


def test_bad_arguments_are_refused_before_any_work(
    session: ifkv.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = session.add(TEXTS[:2])
    with pytest.raises(InvalidInputError, match=r"empty list.*None for all 2"):
        session.conversation([])
    with pytest.raises(InvalidInputError, match="one string"):
        session.conversation(keys[0])
    with pytest.raises(InvalidInputError, match="not in the store"):
        session.conversation(["0" * 64])
    chat = session.conversation(keys)
    chat.ask("Red?", max_new_tokens=2)
    before = state(chat)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a forward was run")

    import ifkv.forward.graphs
    import ifkv.steps.recompute

    monkeypatch.setattr(ifkv.steps.recompute, "run_layers", refuse)
    monkeypatch.setattr(ifkv.forward.graphs, "run_layers", refuse)
    bad: list[tuple[str, dict[str, Any]]] = [
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("ratio", {"ratio": 2}),
        ("choose one of", {"selector": "best"}),
        ("layers", {"selector": "epic", "layers": [1]}),
        ("layers is", {"layers": [99]}),
        ("no option", {"reorder": True}),
        ("no option", {"documents": keys}),
        ("geometry=global", {"selector": "attention-norm:geometry=hl-tp", "revisit": True}),
        ("conversation", {"question": "x" * 2000}),
        ("the question", {"question": "  "}),
        ("stream", {"streamer": object()}),
    ]
    for message, options in bad:
        with pytest.raises(InvalidInputError, match=message):
            chat.ask(**{"question": "Old?", **options})
        with pytest.raises(InvalidInputError, match=message):
            list(chat.stream(**{"question": "Old?", **options}))
    for message, documents in (("empty list", []), ("not in the store", ["1" * 64])):
        with pytest.raises(InvalidInputError, match=message):
            chat.add(documents)
    long = session.add(["word " * 388])
    with pytest.raises(InvalidInputError, match="max_position_embeddings"):
        chat.add(long)
    assert_unchanged(chat, before)


def test_documents_that_fit_alone_but_not_with_the_question(session: ifkv.Session) -> None:
    chat = session.conversation(session.add(["word " * 380]))
    before = state(chat)
    with pytest.raises(InvalidInputError, match="positions are needed for the conversation"):
        chat.ask("x" * 200)
    assert_unchanged(chat, before)


def test_other_weights_and_an_unpatched_model_are_refused(session: ifkv.Session) -> None:
    lamp, door = session.add(TEXTS[:2])
    chat = session.conversation([lamp])
    chat.ask("Red?", max_new_tokens=2)
    before = state(chat)
    base: Any = session.model.base_model
    weight = base.layers[0].self_attn.k_proj.weight
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(FingerprintMismatchError, match="belongs to model"):
        chat.ask("Old?")
    with torch.no_grad():
        weight.div_(2)
    chat.add([door])
    ifkv.unpatch(session.model)
    with pytest.raises(NotPatchedError):
        chat.ask("Old?")
    ifkv.patch(session.model)
    assert torch.equal(chat.token_ids, before[0])
    assert len(chat.ask("Old?", max_new_tokens=2).document_slices) == 2


def test_documents_from_disk_and_a_damaged_one(tmp_path: Path) -> None:
    """What a later turn reads is read whole; what cannot be trusted is made again."""
    memory = make_session()
    store = DiskStore(tmp_path)
    disk = ifkv.Session(memory.model, memory.tokenizer, store=store)
    found = []
    for session in (memory, disk):
        lamp, door, rain, hill = session.add(TEXTS)
        chat = session.conversation([lamp, door])
        chat.ask("Red?", max_new_tokens=3)
        chat.add([rain])
        chat.ask("Rain?", max_new_tokens=3)
        if session is disk:
            with store.folder.file_of(hill).open("r+b") as file:
                file.seek(-1, 2)
                byte = file.read(1)[0]
                file.seek(-1, 2)
                file.write(bytes([byte ^ 1]))
        chat.add([hill])
        if session is disk:
            with pytest.warns(StoreWarning, match="prefilled again"):
                chat.ask("Hill?", max_new_tokens=3)
        else:
            chat.ask("Hill?", max_new_tokens=3)
        found.append(chat)
    assert torch.equal(found[0].token_ids, found[1].token_ids)
    for one, other in zip(found[0].answers, found[1].answers, strict=True):
        assert torch.equal(one.slots, other.slots)
        assert_close(one.first_logits, other.first_logits, what="logits", tolerance=1e-6)


def test_an_answer_that_would_cross_longropes_limit_is_refused_before_any_work() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1],
        "long_factor": [2.0, 4.0],
        "original_max_position_embeddings": 300,
    }
    session = make_session(family="phi3", rope=rope, original_max_position_embeddings=300)
    chat = session.conversation(session.add(TEXTS[:2]))
    chat.ask("Red?", ratio=1, max_new_tokens=3)
    before = state(chat)
    with pytest.raises(InvalidInputError, match="the conversation and answer, but longrope"):
        chat.ask("Old?", max_new_tokens=200)
    assert_unchanged(chat, before)
    answer = chat.ask("Old?", ratio=1, max_new_tokens=3)
    truth = own_logits(session, answer)
    assert_close(answer.first_logits, truth, what="logits", tolerance=EXACT)
