"""Session.ask_many: the answers of ask(), one question after another."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import ifkv
import ifkv.session.ask
import ifkv.session.complete
from ifkv.errors import InvalidInputError, StoreWarning
from ifkv.selectors import Budget
from ifkv.store import DiskStore, MemoryStore
from ifkv.testing import assert_close, tiny_model, tiny_tokenizer

TEXTS = ["The lamp is red.", "The door is green and old.", "It rains.", "Two owls live here."]
QUESTIONS = ["Which colour is the door?", "Rain?", "How many owls live in the old barn?", "Why?"]

SELECTORS = [
    "attention-norm",
    "attention-norm:query=both,layers=0.0-1.0,reduction=sum",
    "attention-norm:geometry=hl-tp,query=question",
    "epic",
    "two-round",
    "cacheblend",
]


def make_session(family: str = "llama", store: Any = None, **options: Any) -> ifkv.Session:
    tokenizer = tiny_tokenizer()
    model = tiny_model(
        family,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=2048,
        **options,
    )
    session = ifkv.Session(model, tokenizer, store=MemoryStore() if store is None else store)
    session.add(TEXTS)
    return session


@pytest.fixture(scope="module")
def session() -> ifkv.Session:
    return make_session()


@pytest.fixture(scope="module")
def windowed() -> ifkv.Session:
    return make_session("mistral", sliding_window=40)


def assert_same_answers(got: list[ifkv.Answer], want: list[ifkv.Answer]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.question == other.question
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.text == other.text
        assert one.order == other.order
        assert one.slots.tolist() == other.slots.tolist()
        assert one.selector == other.selector
        assert one.selection_cost.flops == pytest.approx(other.selection_cost.flops)
        assert one.selection_cost.bytes == pytest.approx(other.selection_cost.bytes)
        assert one.context_ids.tolist() == other.context_ids.tolist()
        assert one.prompt_ids.tolist() == other.prompt_ids.tolist()
        assert one.document_slices == other.document_slices
        assert one.speedup_bound == pytest.approx(other.speedup_bound)
        assert_close(one.first_logits, other.first_logits, what="first logits", tolerance=1e-5)
        assert (one.scores is None) == (other.scores is None)
        if one.scores is not None and other.scores is not None:
            assert_close(one.scores, other.scores, what="scores", tolerance=1e-5)


@given(
    asked=st.lists(
        st.tuples(
            st.sampled_from(QUESTIONS),
            st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=4, unique=True),
        ),
        min_size=1,
        max_size=4,
    ),
    ratio=st.sampled_from([0, 0.15, 0.6, 1]),
    reorder=st.booleans(),
    batch_tokens=st.sampled_from([1, 300, 16384]),
    slide=st.booleans(),
    selector=st.sampled_from(SELECTORS),
)
def test_questions_together_are_questions_one_by_one(
    session: ifkv.Session,
    windowed: ifkv.Session,
    asked: list[tuple[str, list[int]]],
    ratio: float,
    reorder: bool,
    batch_tokens: int,
    slide: bool,
    selector: str,
) -> None:
    used = windowed if slide else session
    questions = [question for question, _ in asked]
    documents = [[used.keys[i] for i in own] for _, own in asked]
    how: dict[str, Any] = {
        "ratio": ratio,
        "reorder": reorder,
        "selector": selector,
        "max_new_tokens": 5,
    }
    got = used.ask_many(questions, documents=documents, batch_tokens=batch_tokens, **how)
    want = [
        used.ask(question, documents=own, **how)
        for question, own in zip(questions, documents, strict=True)
    ]
    assert_same_answers(got, want)


def test_pieces_come_with_their_questions_number(session: ifkv.Session) -> None:
    pieces: dict[int, list[str]] = {i: [] for i in range(len(QUESTIONS))}
    for how in ({}, {"no_repeat_ngram_size": 2}):
        for heard in pieces.values():
            heard.clear()
        answers = session.ask_many(
            QUESTIONS,
            max_new_tokens=8,
            batch_tokens=500,
            stream=lambda i, text: pieces[i].append(text),
            **how,
        )
        for i, answer in enumerate(answers):
            assert "".join(pieces[i]).strip() == answer.text


def test_what_is_not_greedy_is_decoded_one_by_one(session: ifkv.Session) -> None:
    for how in ({"num_beams": 2}, {"do_sample": True, "temperature": 1.4}):
        torch.manual_seed(5)
        got = session.ask_many(QUESTIONS[:2], max_new_tokens=6, **how)
        torch.manual_seed(5)
        want = [session.ask(question, max_new_tokens=6, **how) for question in QUESTIONS[:2]]
        assert_same_answers(got, want)


@pytest.mark.parametrize("selector", ["attention-norm", "sink-aware", "prophetkv:query=both"])
def test_all_questions_of_a_batch_share_its_passes(session: ifkv.Session, selector: str) -> None:
    base: Any = session.model.base_model
    calls = []
    look = ifkv.observer(lambda _, args: calls.append(args[0].shape[1]))
    hook = base.layers[0].register_forward_pre_hook(look)
    try:
        session.ask_many(QUESTIONS, selector=selector, max_new_tokens=1)
        together = list(calls)
        calls.clear()
        session.ask_many(QUESTIONS, selector=selector, max_new_tokens=1, batch_tokens=1)
    finally:
        hook.remove()
    assert len(together) == 2, "one scoring pass, one of recompute and prompts"
    assert len(calls) == 2 * len(QUESTIONS)
    assert sum(calls) == sum(together)


def test_a_stored_document_that_questions_share_is_read_once(tmp_path: Any) -> None:
    store = DiskStore(tmp_path / "store")
    session = make_session(store=store)
    want = session.ask_many(QUESTIONS, ratio=0.3, max_new_tokens=4)
    read: list[int] = []
    documents = [store.get(key, lazy=True) for key in session.keys]

    class Counting:
        """The store, with what it hands out listened to."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def __contains__(self, key: str) -> bool:
            return key in store

        def get(self, key: str, *, lazy: bool) -> Any:
            document: Any = documents[session.keys.index(key)]
            inner = document._read_layer

            def count(layer: int, out: torch.Tensor) -> None:
                read.append(layer)
                inner(layer, out)

            object.__setattr__(document, "_read_layer", count)
            return document

    session.engine.library.store = Counting()  # type: ignore[assignment]
    got = session.ask_many(QUESTIONS, ratio=0.3, max_new_tokens=4)
    assert_same_answers(got, want)
    base: Any = session.model.base_model
    assert len(read) == len(TEXTS) * len(base.layers)


@pytest.mark.parametrize("reorder", [False, True])
def test_a_damaged_document_is_made_again_on_the_way(tmp_path: Any, reorder: bool) -> None:
    store = DiskStore(tmp_path / "store")
    session = make_session(store=store)
    how: dict[str, Any] = {"ratio": 0.3, "max_new_tokens": 4, "reorder": reorder}
    want = session.ask_many(QUESTIONS, **how)
    for key in (session.keys[1], session.keys[3]):
        path = store.folder.file_of(key)
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)
    with pytest.warns(StoreWarning, match="could not be trusted"):
        got = session.ask_many(QUESTIONS, batch_tokens=400, **how)
    assert_same_answers(got, want)


def test_budgets_that_smooth_by_sentences(session: ifkv.Session) -> None:
    budget = Budget(ratio=0.3, sentences=True)
    got = session.ask_many(QUESTIONS, ratio=budget, max_new_tokens=3)
    assert_same_answers(got, [session.ask(q, ratio=budget, max_new_tokens=3) for q in QUESTIONS])


def test_no_questions_give_no_answers(session: ifkv.Session) -> None:
    assert session.ask_many([]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": "Why?"}, "questions is one string"),
        ({"questions": ["Why?", " "]}, "request 1: the question is ' '"),
        ({"ratio": 1.5}, "1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"layers": [99]}, "layers is"),
        ({"selector": "best"}, "best"),
        ({"selector": "epic", "layers": [1]}, "has no scoring layers"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"documents": "abc"}, "documents is one string"),
        ({"documents": [["0" * 64], None]}, "request 0: document '0+' is not in the store"),
        ({"documents": [None, []]}, "request 1: documents is an empty list"),
        ({"documents": []}, "request 0: documents is an empty list"),
        ({"documents": [None]}, "documents has 1 lists for 2 questions"),
        ({"documents": ["key", None]}, "both keys and lists"),
        ({"questions": ["Why?", "word " * 600]}, "request 1: .* positions are needed"),
    ],
)
def test_one_bad_question_is_refused_before_any_work(
    session: ifkv.Session, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(ifkv.session.ask, "prepare", refuse)
    arguments: dict[str, Any] = {"questions": QUESTIONS[:2], "batch_tokens": 1} | change
    with pytest.raises(InvalidInputError, match=message):
        session.ask_many(**arguments)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"ratio": 1.0},
        {"reorder": True, "ratio": 0.3},
        {"repetition_penalty": 1.3},
        {"do_sample": True, "temperature": 3.0, "seed": 7},
        {"num_beams": 2},
    ],
    ids=str,
)
def test_a_question_is_the_first_of_a_list_of_one(session: ifkv.Session, how: Any) -> None:
    (many,) = session.ask_many(QUESTIONS[:1], max_new_tokens=6, **how)
    alone = session.ask(QUESTIONS[0], max_new_tokens=6, **how)
    assert_same_answers([alone], [many])
    assert torch.equal(alone.first_logits, many.first_logits)
    assert alone.order == many.order
    assert alone.finish_reason == many.finish_reason
    assert alone.timings.keys() == many.timings.keys()


def test_sampling_has_a_seed_for_each_question(session: ifkv.Session) -> None:
    how = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 8}
    before = torch.random.get_rng_state()
    same = session.ask_many(QUESTIONS[:2], seed=3, **how)
    assert torch.equal(torch.random.get_rng_state(), before), "others' random numbers go on"
    own = session.ask_many(QUESTIONS[:2], seed=[3, 4], **how)
    alone = [session.ask(q, seed=s, **how) for q, s in zip(QUESTIONS, (3, 4), strict=False)]
    assert_same_answers(own, alone)
    assert same[0].token_ids.tolist() == own[0].token_ids.tolist()
    assert same[1].token_ids.tolist() != own[1].token_ids.tolist()
    ready = session.prepare(QUESTIONS[0])
    assert_same_answers([session.complete(ready, seed=3, **how)], alone[:1])


@pytest.mark.parametrize(
    ("seed", "message"),
    [(-1, "whole number"), (1.5, "whole number"), (True, "whole number"), ([1], "1 seeds")],
)
def test_bad_seeds_are_refused_before_any_work(
    session: ifkv.Session, monkeypatch: pytest.MonkeyPatch, seed: Any, message: str
) -> None:
    monkeypatch.setattr(ifkv.session.ask, "prepare", lambda *_: pytest.fail("work was done"))
    with pytest.raises(InvalidInputError, match=message):
        session.ask_many(QUESTIONS[:2], do_sample=True, seed=seed)


def test_a_greedy_question_alone_is_decoded_like_many(
    session: ifkv.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams, too, that may be closed; what generate() alone can do goes there."""
    monkeypatch.setattr(
        ifkv.session.complete, "run_generate", lambda *_, **__: pytest.fail("generate() was called")
    )
    expected = session.ask(QUESTIONS[0], max_new_tokens=6)
    assert "".join(session.stream(QUESTIONS[0], max_new_tokens=6)).strip() == expected.text
    stream = session.stream(QUESTIONS[0], max_new_tokens=200, eos_token_id=-1)
    next(stream)
    stream.close()
    assert stream.answer is not None
    assert stream.answer.finish_reason == "closed"
    assert len(stream.answer.token_ids) < 200
