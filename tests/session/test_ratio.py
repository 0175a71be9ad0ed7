"""`ratio="auto"`: a session asks a planner, does what it says, and tells."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch

import ifkv
from ifkv.cost import ModelShape
from ifkv.errors import CalibrationWarning, InvalidInputError
from ifkv.planning import Planner
from ifkv.planning.calibration import Rates
from ifkv.selectors import Budget
from ifkv.store import MemoryStore
from ifkv.testing import tiny_model, tiny_tokenizer
from rates import PASSES_COST, ROWS_COST

TEXTS = ["The lamp is red and stands by the door. " * 4, "The door is green. " * 9]
QUESTION = "Which colour is the lamp?"


def session(rates: Rates | None = ROWS_COST, **options: Any) -> ifkv.Session:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048)
    planner = None if rates is None else Planner(ModelShape.of(model), rates)
    made = ifkv.Session(model, tokenizer, store=MemoryStore(), planner=planner, **options)
    made.add(TEXTS)
    return made


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models for which this machine was measured."""
    asked: list[Any] = []

    def planner_for(model: Any, **options: Any) -> Planner:
        asked.append(model)
        return Planner(ModelShape.of(model), ROWS_COST)

    monkeypatch.setattr("ifkv.planning.planner.planner_for", planner_for)
    return asked


def test_auto_is_the_plan_s_ratio_and_the_answer_tells() -> None:
    asked = session()
    answer = asked.ask(QUESTION, ratio="auto", max_new_tokens=2)
    plan = answer.plan
    assert plan is not None
    assert plan.tokens == len(answer.context_ids)
    assert plan.prompt == len(answer.prompt_ids)
    assert plan.documents == 2
    assert plan.ratio is not None
    same = asked.ask(QUESTION, ratio=plan.ratio, max_new_tokens=2)
    assert same.plan is None
    assert torch.equal(answer.slots, same.slots)
    assert torch.equal(answer.first_logits, same.first_logits)


def test_auto_is_everything_where_plain_prefill_is_recommended() -> None:
    asked = session(PASSES_COST)
    answer = asked.ask(QUESTION, ratio="auto", max_new_tokens=2)
    assert answer.plan is not None
    assert answer.plan.ratio is None
    first = answer.document_slices[0].stop
    assert answer.slots.tolist() == list(range(first, len(answer.context_ids)))
    full = asked.ask(QUESTION, ratio=1, max_new_tokens=2)
    assert torch.equal(answer.first_logits, full.first_logits)


def test_the_session_s_own_ratio_is_taken_where_none_is_given() -> None:
    asked = session(ratio="auto")
    assert asked.ask(QUESTION, max_new_tokens=1).plan is not None
    assert asked.ask(QUESTION, ratio=0, max_new_tokens=1).slots.tolist() == []
    assert session(ratio=0).ask(QUESTION, max_new_tokens=1).slots.tolist() == []
    assert len(session(ratio=Budget(number=3)).ask(QUESTION, max_new_tokens=1).slots) == 3
    (many,) = session(ratio=0).ask_many([QUESTION], max_new_tokens=1)
    assert many.slots.tolist() == []
    turn = session(ratio=0).conversation().ask(QUESTION, max_new_tokens=1)
    assert turn.slots.tolist() == []


def test_a_session_measures_once_and_only_for_auto(measured: list[Any]) -> None:
    asked = session(rates=None, ratio="auto")
    asked.ask(QUESTION, ratio=0.15, max_new_tokens=1)
    assert measured == []
    threads = [threading.Thread(target=asked.prepare, args=(QUESTION,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert measured == [asked.model]


def test_a_session_tells_once_that_its_rates_are_in_doubt() -> None:
    asked = session(dataclasses.replace(ROWS_COST, disagreement=2.0), ratio="auto")
    with pytest.warns(CalibrationWarning, match="probably busy.*--recalibrate") as warned:
        answers = [asked.ask(QUESTION, max_new_tokens=1) for _ in range(3)]
    assert len(warned) == 1
    assert all(answer.plan.doubt for answer in answers)


def test_the_time_to_first_token_is_without_the_measuring(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("ifkv.session.stopwatch.time.perf_counter", lambda: clock[0])

    def planner_for(model: Any, **options: Any) -> Planner:
        clock[0] += 1000
        return Planner(ModelShape.of(model), ROWS_COST)

    monkeypatch.setattr("ifkv.planning.planner.planner_for", planner_for)
    assert session(rates=None).prepare(QUESTION, ratio="auto").ttft_seconds < 1000


def test_plans_travel_with_prepared_questions() -> None:
    asked = session()
    ready = asked.prepare(QUESTION, ratio="auto")
    assert asked.complete(ready, max_new_tokens=1).plan is ready.plan is not None


@pytest.mark.parametrize("ratio", ["fast", "", "AUTO", "0.15", 1.2, True])
def test_other_words_are_refused(measured: list[Any], ratio: Any) -> None:
    with pytest.raises(InvalidInputError, match="ratio is"):
        session(rates=None).ask(QUESTION, ratio=ratio)
    with pytest.raises(InvalidInputError, match="ratio is"):
        session(rates=None, ratio=ratio)
    assert measured == []


@pytest.mark.parametrize(
    ("options", "words"),
    [({"selector": "epic"}, "selector='epic"), ({"reorder": True}, "reorder=True")],
)
def test_what_is_not_predicted_is_refused(measured: list[Any], options, words) -> None:
    with pytest.raises(InvalidInputError, match=words):
        session(rates=None).ask(QUESTION, ratio="auto", **options)
    assert measured == []


def test_conversations_are_not_planned(measured: list[Any]) -> None:
    for asked, options in ((session(None), {"ratio": "auto"}), (session(None, ratio="auto"), {})):
        with pytest.raises(InvalidInputError, match="turns of a conversation"):
            asked.conversation().ask(QUESTION, **options)
    assert measured == []


def test_each_question_of_a_batch_is_planned() -> None:
    asked = session(ratio="auto")
    questions = [QUESTION, "And what else is there to be told?"]
    many = asked.ask_many(questions, max_new_tokens=2)
    for question, answer in zip(questions, many, strict=True):
        alone = asked.ask(question, max_new_tokens=2)
        assert answer.plan is not None
        assert answer.plan.ratio == alone.plan.ratio
        assert torch.equal(answer.slots, alone.slots)
        assert torch.equal(answer.token_ids, alone.token_ids)
