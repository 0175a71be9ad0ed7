"""`async for piece in session.stream(...)`: the event loop goes on while the answer is made."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

import ifkv
from ifkv.errors import InvalidInputError
from long_answers import long_answer, session_over

TEXTS = ["The lamp is red.", "The door is green and old."]
QUESTION = "Which?"


@pytest.fixture(scope="module")
def session() -> ifkv.Session:
    return session_over(TEXTS)


async def no_workers() -> None:
    for _ in range(2000):
        if not [each for each in threading.enumerate() if each.name == "ifkv-stream"]:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("a stream's thread goes on")


@pytest.mark.parametrize("options", [{}, {"ratio": 1}, {"num_beams": 2}])
def test_pieces_are_those_of_ask(session: ifkv.Session, options: dict[str, Any]) -> None:
    async def read() -> Any:
        stream = session.stream(QUESTION, max_new_tokens=8, **options)
        assert stream.answer is None
        text = "".join([piece async for piece in stream])
        assert [piece async for piece in stream] == []
        return text, stream.answer

    expected = session.ask(QUESTION, max_new_tokens=8, **options)
    text, answer = asyncio.run(read())
    assert text.strip() == expected.text
    assert torch.equal(answer.token_ids, expected.token_ids)
    assert answer.finish_reason == expected.finish_reason


def test_the_loop_goes_on_meanwhile(session: ifkv.Session) -> None:
    """Each token waits for the loop to do something else."""
    tick = threading.Event()

    def waiting(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert tick.wait(30), "the loop was held up"
        tick.clear()
        return torch.zeros(len(input_ids), dtype=torch.bool)

    async def ticking() -> None:
        while True:
            await asyncio.sleep(0.001)
            tick.set()

    async def read() -> str:
        ticker = asyncio.create_task(ticking())
        options = dict(stopping_criteria=[waiting], max_new_tokens=6)
        text = "".join([piece async for piece in session.stream(QUESTION, **options)])
        ticker.cancel()
        return text

    assert asyncio.run(read()).strip() == session.ask(QUESTION, max_new_tokens=6).text


def test_streams_may_run_side_by_side(session: ifkv.Session) -> None:
    async def read(question: str) -> str:
        return "".join([piece async for piece in session.stream(question, max_new_tokens=8)])

    async def both() -> list[str]:
        return list(await asyncio.gather(*map(read, questions)))

    questions = [QUESTION, "Red?"]
    expected = [session.ask(question, max_new_tokens=8).text for question in questions]
    assert [text.strip() for text in asyncio.run(both())] == expected


def test_leaving_the_loop_stops_the_answer(session: ifkv.Session) -> None:
    async def read() -> None:
        async for piece in session.stream(QUESTION, **long_answer(session)):
            assert piece
            break
        await no_workers()

    asyncio.run(read())


def test_aclose_stops_the_answer_and_waits(session: ifkv.Session) -> None:
    async def read() -> Any:
        stream = session.stream(QUESTION, **long_answer(session))
        await anext(stream)
        await stream.aclose()
        assert not [each for each in threading.enumerate() if each.name == "ifkv-stream"]
        assert [piece async for piece in stream] == []
        await stream.aclose()
        return stream.answer

    answer = asyncio.run(read())
    assert 1 <= len(answer.token_ids) < 400
    assert answer.finish_reason == "closed"


def test_aclose_ends_a_reader_in_another_task(session: ifkv.Session) -> None:
    hold = threading.Event()

    def holding(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        hold.wait(30)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    async def read() -> None:
        options = long_answer(session) | {"stopping_criteria": [holding]}
        stream = session.stream(QUESTION, **options)
        reader = asyncio.create_task(_all(stream))
        await asyncio.sleep(0.2)
        closer = asyncio.create_task(stream.aclose())
        await asyncio.sleep(0.05)
        hold.set()
        await closer
        await reader
        await no_workers()

    asyncio.run(read())


async def _all(stream: Any) -> list[str]:
    return [piece async for piece in stream]


def test_a_reader_that_is_cancelled_stops_the_answer(session: ifkv.Session) -> None:
    async def read() -> None:
        reader = asyncio.create_task(_all(session.stream(QUESTION, **long_answer(session))))
        await asyncio.sleep(0.3)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await no_workers()

    asyncio.run(read())


def test_a_stream_never_begun_is_closed(session: ifkv.Session) -> None:
    async def read() -> None:
        stream = session.stream(QUESTION)
        await stream.aclose()
        assert [piece async for piece in stream] == []
        assert stream.answer is None

    asyncio.run(read())


def test_what_goes_wrong_reaches_the_reader(session: ifkv.Session) -> None:
    def failing(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")

    for options, error, message in (
        ({"max_new_tokens": 0}, InvalidInputError, "max_new_tokens is 0"),
        ({"stopping_criteria": [failing]}, RuntimeError, "out of memory"),
    ):
        with pytest.raises(error, match=message):
            asyncio.run(_all(session.stream(QUESTION, **options)))


def test_a_stream_is_read_in_one_way(session: ifkv.Session) -> None:
    stream = session.stream(QUESTION, max_new_tokens=2)
    next(stream)
    with pytest.raises(InvalidInputError, match="read by for, not by async for"):
        asyncio.run(_all(stream))
    with pytest.raises(InvalidInputError, match=r"call close\(\)"):
        asyncio.run(stream.aclose())
    stream.close()

    async def read() -> None:
        other = session.stream(QUESTION, max_new_tokens=2)
        await anext(other)
        with pytest.raises(InvalidInputError, match="read by async for, not by for"):
            next(other)
        with pytest.raises(InvalidInputError, match=r"call await aclose\(\)"):
            other.close()
        await other.aclose()

    asyncio.run(read())


def test_turns_of_a_conversation_may_be_read_so(session: ifkv.Session) -> None:
    async def read() -> list[str]:
        return [piece async for piece in chat.stream(QUESTION, max_new_tokens=5)]

    chat = session.conversation()
    text = "".join(asyncio.run(read()))
    assert chat.answers[-1].text == text.strip()
    twin = session.conversation()
    twin.ask(QUESTION, max_new_tokens=5)
    assert chat.token_ids.tolist() == twin.token_ids.tolist()
    assert "".join(asyncio.run(read())).strip() == twin.ask(QUESTION, max_new_tokens=5).text
