"""Why an answer ended: in every way of asking, and where people look."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StoppingCriteriaList

import ifkv
from ifkv.evaluation.compare import compare
from ifkv.report import AnswerRow, comparison_table
from ifkv.store import MemoryStore
from ifkv.testing import tiny_model, tiny_tokenizer

QUESTION = "Which?"


@pytest.fixture(scope="module")
def session() -> ifkv.Session:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048)
    made = ifkv.Session(model, tokenizer, store=MemoryStore(), ratio=1)
    made.add(["The lamp is red.", "The door is green."])
    return made


def third(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
    return torch.full((len(input_ids),), input_ids.shape[1] % 3 == 0)


def slowly(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    time.sleep(0.02)
    return scores


ENDS: dict[str, tuple[dict[str, Any], str]] = {
    "at its length": (dict(max_new_tokens=4), "length"),
    "at a stop token": (dict(max_new_tokens=4, eos_token_id=list(range(260))), "stop"),
    "at a stop token that is the last": (
        dict(max_new_tokens=1, eos_token_id=list(range(260))),
        "stop",
    ),
    "at a stop token of beams": (
        dict(max_new_tokens=9, eos_token_id=list(range(200)), num_beams=2),
        "stop",
    ),
    "at a stop token forced at its length": (
        dict(max_new_tokens=4, eos_token_id=1, forced_eos_token_id=1),
        "length",
    ),
    "at one's own criteria": (
        dict(max_new_tokens=9, stopping_criteria=StoppingCriteriaList([third])),
        "criteria",
    ),
    "at its time": (
        dict(max_new_tokens=200, max_time=0.05, logits_processor=[slowly]),
        "time",
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_every_way_of_asking_says_why_an_answer_ended(session: ifkv.Session, name: str) -> None:
    options, reason = ENDS[name]
    stream, chat = session.stream(QUESTION, **options), session.conversation()
    turns = chat.stream(QUESTION, **options)
    list(stream), list(turns)
    answers = [
        session.ask(QUESTION, **options),
        session.ask_many([QUESTION], **options)[0],
        session.complete(session.prepare(QUESTION), **options),
        stream.answer,
        turns.answer,
        session.conversation().ask(QUESTION, **options),
    ]
    assert [answer and answer.finish_reason for answer in answers] == [reason] * len(answers)


def test_requests_of_a_batch_end_each_for_a_reason_of_its_own(session: ifkv.Session) -> None:
    questions = [QUESTION, "Red?", "And the door, what of it?"]
    alone = [session.ask(each, max_new_tokens=6) for each in questions]
    ends = [alone[0].token_ids[2].item()]
    expected = [session.ask(each, max_new_tokens=6, eos_token_id=ends) for each in questions]
    answers = session.ask_many(questions, max_new_tokens=6, eos_token_id=ends)
    assert answers[0].finish_reason == "stop"
    for answer, one in zip(answers, expected, strict=True):
        assert answer.finish_reason == one.finish_reason
        assert answer.token_ids.tolist() == one.token_ids.tolist()


def test_an_answer_that_was_cut_off_shows_it(session: ifkv.Session, tmp_path: Path) -> None:
    cut = session.ask(QUESTION, max_new_tokens=4)
    assert "cut off at 4 tokens" in repr(cut)
    cut.to_html(tmp_path / "cut.html")
    assert "[cut off at 4 tokens]" in (tmp_path / "cut.html").read_text()
    whole = session.ask(QUESTION, max_new_tokens=4, eos_token_id=list(range(260)))
    assert "cut off" not in repr(whole)
    whole.to_html(tmp_path / "whole.html")
    assert "cut off" not in (tmp_path / "whole.html").read_text()


def test_a_table_marks_the_answers_that_were_cut_off() -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    rows = [
        AnswerRow("full prefill", 1.0, "red", cut="cut off at 4 tokens"),
        AnswerRow("stitch only", 1.0, "green"),
    ]
    console.print(comparison_table(rows))
    first, second = (line for line in console.export_text().splitlines() if "1.00 s" in line)
    assert "red [cut off at 4 tokens]" in first
    assert "cut" not in second


def test_ways_compared_say_it(session: ifkv.Session) -> None:
    ways = compare(session, QUESTION, ratios=(0.0, 1.0), max_new_tokens=3)
    assert [(way.finish_reason, way.tokens) for way in ways] == [("length", 3)] * 3
