"""Every way of asking one question, and every place where a setting may be given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

import ifkv

TEXTS = ["The lamp is red.", "The door is green."]
QUESTION = "Which?"
EVEN = list(range(0, 260, 2))


def asked(session: ifkv.Session, **options: Any) -> list[int]:
    return session.ask(QUESTION, **options).token_ids.tolist()


def asked_together(session: ifkv.Session, **options: Any) -> list[int]:
    return session.ask_many([QUESTION], **options)[0].token_ids.tolist()


def streamed(session: ifkv.Session, **options: Any) -> list[int]:
    stream = session.stream(QUESTION, **options)
    text = "".join(stream)
    assert stream.answer is not None
    assert text.strip() == stream.answer.text
    return stream.answer.token_ids.tolist()


def streamed_together(session: ifkv.Session, **options: Any) -> list[int]:
    pieces: list[str] = []
    (answer,) = session.ask_many([QUESTION], stream=lambda _, text: pieces.append(text), **options)
    assert "".join(pieces).strip() == answer.text
    return answer.token_ids.tolist()


def conversed(session: ifkv.Session, **options: Any) -> list[int]:
    return session.conversation().ask(QUESTION, **options).token_ids.tolist()


def completed(session: ifkv.Session, **options: Any) -> list[int]:
    return session.complete(session.prepare(QUESTION), **options).token_ids.tolist()


WAYS: dict[str, Callable[..., list[int]]] = {
    each.__name__: each
    for each in (asked, asked_together, streamed, streamed_together, conversed, completed)
}


def as_keywords(session: ifkv.Session, folder: Path, said: dict[str, Any]) -> dict[str, Any]:
    return said


def as_config(session: ifkv.Session, folder: Path, said: dict[str, Any]) -> dict[str, Any]:
    return {"generation_config": GenerationConfig(**said)}


def as_attributes(session: ifkv.Session, folder: Path, said: dict[str, Any]) -> dict[str, Any]:
    for name, value in said.items():
        setattr(session.model.generation_config, name, value)
    return {}


def as_file(session: ifkv.Session, folder: Path, said: dict[str, Any]) -> dict[str, Any]:
    (folder / "generation_config.json").write_text(json.dumps(said))
    session.model.generation_config = GenerationConfig.from_pretrained(folder)
    return {}


PLACES = {each.__name__: each for each in (as_keywords, as_config, as_attributes, as_file)}
