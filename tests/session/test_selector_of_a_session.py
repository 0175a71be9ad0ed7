"""The selector of a session and of a question: named, given, or the default one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ifkv
import ifkv.selectors
from ifkv.errors import InvalidInputError, NotPatchedError
from ifkv.evaluation.compare import compare
from ifkv.steps.select import budget
from ifkv.store import MemoryStore
from ifkv.testing import assert_close, tiny_model, tiny_tokenizer
from sessions import QUESTION, TEXTS, full_logits, make_session

LOOKING = "value-aware:query=question"


@pytest.fixture
def session() -> ifkv.Session:
    session = make_session()
    session.add(TEXTS)
    return session


@pytest.mark.parametrize("name", ifkv.selectors.names())
def test_every_selector_by_name_meets_both_ends(session: ifkv.Session, name: str) -> None:
    stitched = session.prepare(QUESTION, ratio=0)
    assert_close(
        session.prepare(QUESTION, ratio=0, selector=name).logits, stitched.logits, what="at 0"
    )
    whole = session.prepare(QUESTION, ratio=1, selector=name)
    assert_close(whole.logits, full_logits(session), what="at 1", tolerance=1e-10)
    between = session.prepare(QUESTION, ratio=0.3, selector=name)
    assert len(between.slots) == budget(len(session.context_ids()), 0.3)
    assert between.selector == name
    answer = session.complete(between, max_new_tokens=1)
    assert (answer.selector, answer.selection_cost) == (name, between.selection_cost)


def test_attention_norm_is_score_and_select(session: ifkv.Session) -> None:
    ready = session.prepare(QUESTION, layers=[-1], selector="attention-norm")
    cache = ifkv.stitch(session.model, [session.store.get(key) for key in session.keys])
    scores = ifkv.score(session.model, cache, ready.prompt_ids, layers=[-1])
    assert torch.equal(ready.slots, ifkv.select(cache, scores))
    assert ready.scores is not None
    assert torch.equal(ready.scores, scores)


def test_layers_are_those_of_the_default_selector(session: ifkv.Session) -> None:
    ready = session.prepare(QUESTION, layers=[-2, -1])
    assert ready.selector == f"{ifkv.selectors.DEFAULT_SELECTOR}:layers=-2+-1"
    named = session.prepare(QUESTION, selector=ready.selector)
    assert torch.equal(ready.slots, named.slots)


def test_an_answer_tells_what_the_question_looks_at(session: ifkv.Session) -> None:
    """The default selector looks in all layers and raises beginnings; people are not shown that."""
    answer = session.ask(QUESTION, ratio=0.3, max_new_tokens=1)
    plain = session.ask(QUESTION, ratio=0.3, max_new_tokens=1, selector=LOOKING)
    assert answer.attention is not None
    assert plain.scores is not None
    assert torch.equal(answer.attention, plain.scores)
    assert not torch.equal(answer.attention, answer.scores)
    (turn,) = [session.conversation().ask(QUESTION, ratio=0.3, max_new_tokens=1)]
    (many,) = session.ask_many([QUESTION], ratio=0.3, max_new_tokens=1)
    for other in (turn, many):
        assert_close(other.attention, answer.attention, what="attention")
    assert session.ask(QUESTION, selector="epic", max_new_tokens=1).attention is None
    assert session.ask(QUESTION, ratio=0, max_new_tokens=1).attention is None


def test_selectors_see_question_documents_and_order(session: ifkv.Session) -> None:
    """The bare question, another geometry under a new order, a budget that smooths by sentence."""
    spec = "attention-norm:query=question,geometry=hl-tp"
    ready = session.prepare(QUESTION, ratio=0.4, reorder=True, selector=spec)
    documents = [session.store.get(key) for key in session.keys]
    cache = ifkv.stitch(session.model, documents, order=ready.cache.order, geometry="hl-tp")
    scores = ifkv.score(session.model, cache, session.format.encode(QUESTION))
    assert torch.equal(ready.slots, ifkv.select(cache, scores, ratio=0.4))
    amount = ifkv.selectors.Budget(number=12, sentences=True)
    assert len(session.prepare(QUESTION, ratio=amount, selector="random").slots) == 12


def test_selectors_and_layers_that_do_not_fit_are_refused(session: ifkv.Session) -> None:
    with pytest.raises(InvalidInputError, match="selector epic has no scoring layers"):
        session.prepare(QUESTION, selector="epic", layers=[1])
    with pytest.raises(InvalidInputError, match="selector value-aware:layers=0 names its own"):
        session.prepare(QUESTION, selector="value-aware:layers=0", layers=[1])
    with pytest.raises(InvalidInputError, match="choose one of"):
        session.ask(QUESTION, selector="best")


def test_a_sessions_selector_is_that_of_requests_which_name_none() -> None:
    session = make_session(selector="epic:by=tokens")
    keys = session.add(TEXTS)
    chat = session.conversation(keys)
    found = [
        session.prepare(QUESTION).selector,
        session.ask(QUESTION, max_new_tokens=1).selector,
        session.ask_many([QUESTION], max_new_tokens=1)[0].selector,
        chat.ask(QUESTION, max_new_tokens=1).selector,
        compare(session, QUESTION, ratios=(0.3,), max_new_tokens=1)[-1].answer.selector,
    ]
    assert found == ["epic:by=tokens"] * len(found)
    assert session.prepare(QUESTION, selector="recency").selector == "recency"
    with pytest.raises(InvalidInputError, match="selector epic:by=tokens has no scoring layers"):
        session.prepare(QUESTION, layers=[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selector": "best"}, "choose one of"),
        ({"selector": "epic", "ratio": "auto"}, "ratio='auto'.* with selector='epic'"),
    ],
)
def test_a_sessions_bad_selector_is_refused_before_the_model_is_patched(
    options: dict[str, Any], message: str
) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    with pytest.raises(InvalidInputError, match=message):
        ifkv.Session(model, tokenizer, store=MemoryStore(), **options)
    with pytest.raises(NotPatchedError):
        ifkv.prefill_documents(model, [[1, 2]])
