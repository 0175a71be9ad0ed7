"""Invented texts and questions of the demo, so that no answer comes from a model's memory."""

from __future__ import annotations

import dataclasses
import tomllib
from importlib import resources
from typing import Any


@dataclasses.dataclass(frozen=True)
class Passage:
    """Short text about one thing.

    Attributes:
        title: What it is about.
        body: Paragraphs, one per line.
    """

    title: str
    body: str

    @property
    def text(self) -> str:
        """Return title and body, as a document for [ifkv.Session.add][]."""
        return f"{self.title}\n\n{self.body}"


@dataclasses.dataclass(frozen=True)
class Question:
    """Question that one passage answers.

    Attributes:
        text: The question.
        answer: Words of the passage that answer it.
        passage: Index of the passage.
    """

    text: str
    answer: str
    passage: int

    def answered_by(self, text: str) -> bool:
        """True if ``text`` contains the answer, ignoring case."""
        return self.answer.casefold() in text.casefold()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Corpus of the demo: its passages and the questions about them.

    Attributes:
        passages: Twelve passages of about 300 tokens each.
        questions: Questions, each answered by a different passage.
    """

    passages: tuple[Passage, ...]
    questions: tuple[Question, ...]


def load_corpus() -> Corpus:
    """Read the passages and questions that ship with the package."""
    source = resources.files("ifkv.demo").joinpath("passages.toml")
    tables: dict[str, list[dict[str, Any]]] = tomllib.loads(source.read_text(encoding="utf-8"))
    passages = tuple(Passage(table["title"], table["text"].strip()) for table in tables["passage"])
    index = {passage.title: number for number, passage in enumerate(passages)}
    questions = tuple(
        Question(table["text"], table["answer"], index[table["passage"]])
        for table in tables["question"]
    )
    return Corpus(passages, questions)
