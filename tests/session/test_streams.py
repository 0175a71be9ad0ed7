"""Session.stream: the pieces of the answer that ask gives, for a loop that may be left."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import pytest
import torch

import ifkv
from ifkv.errors import InvalidInputError
from long_answers import long_answer, session_over

TEXTS = ["The lamp is red.", "The door is green and old.", "It rains in the valley."]
QUESTION = "Which colour is the door?"


@pytest.fixture(scope="module")
def session() -> ifkv.Session:
    return session_over(TEXTS)


def workers() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "ifkv-stream"]


@pytest.mark.parametrize("options", [{}, {"ratio": 1}, {"num_beams": 1, "do_sample": False}])
def test_pieces_are_those_of_ask(session: ifkv.Session, options: dict[str, Any]) -> None:
    expected = session.ask(QUESTION, max_new_tokens=8, **options)
    stream = session.stream(QUESTION, max_new_tokens=8, **options)
    assert stream.answer is None
    assert "".join(stream).strip() == expected.text
    assert stream.answer is not None
    assert torch.equal(stream.answer.token_ids, expected.token_ids)
    assert torch.equal(stream.answer.slots, expected.slots)


def test_streams_may_run_side_by_side(session: ifkv.Session) -> None:
    questions = [QUESTION, "Red?"]
    expected = [session.ask(question, max_new_tokens=8).text for question in questions]
    streams = [session.stream(question, max_new_tokens=8) for question in questions]
    said = ["", ""]
    for _ in range(40):
        for index, stream in enumerate(streams):
            said[index] += next(stream, "")
    assert [text.strip() for text in said] == expected


def test_a_stream_that_is_closed_stops_the_answer(session: ifkv.Session) -> None:
    stream = session.stream(QUESTION, **long_answer(session))
    next(stream)
    stream.close()
    assert stream.answer is not None
    assert 1 <= len(stream.answer.token_ids) < 400
    assert list(stream) == []
    assert workers() == []


def test_a_stream_that_is_dropped_stops_the_answer(session: ifkv.Session) -> None:
    gc.disable()  # it must not take a collection
    try:
        for piece in session.stream(QUESTION, **long_answer(session)):
            assert piece
            break
        deadline = time.monotonic() + 20
        while workers() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert workers() == []
    finally:
        gc.enable()


def test_one_s_own_criteria_stop_it_too(session: ifkv.Session) -> None:
    def three(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(1)
        return torch.full((len(input_ids),), len(seen) == 3)

    seen: list[int] = []
    stream = session.stream(QUESTION, stopping_criteria=[three], **long_answer(session))
    assert "".join(stream).count("a") <= 3
    assert stream.answer is not None
    assert len(stream.answer.token_ids) == 3


def test_nothing_happens_before_the_first_piece(session: ifkv.Session) -> None:
    session.stream(QUESTION)
    assert workers() == []
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"tempreature": 1}, "did you mean temperature"),
        ({"ratio": 2}, "ratio is 2"),
    ):
        stream = session.stream(QUESTION, **options)
        with pytest.raises(InvalidInputError, match=message):
            next(stream)
        assert stream.answer is None
