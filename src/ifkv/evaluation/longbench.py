"""LongBench's file format (arXiv 2308.14508): one JSON object per line, one long context each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ifkv.errors import InvalidInputError
from ifkv.evaluation.questions import Dataset, Passage, Question

# Heading of a passage in LongBench's multi-document sets (2WikiMQA, MuSiQue, HotpotQA).
_HEADING = re.compile(r"^Passage \d+:[ \t]*\n?", re.MULTILINE)


def longbench(path: Path) -> Dataset:
    """Return the questions of a file with ``input``, ``context`` and ``answers`` on every line.

    A context is cut at the headings "Passage 1:", "Passage 2:" and so on, which are left out. A
    context without such headings is a single passage, to be cut by length.

    Args:
        path: The file.

    Returns:
        The data set, in which passages keep their order.

    Raises:
        InvalidInputError: The file cannot be read, or a line is wrong; the message gives its
            number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"{path} cannot be read ({error}); give a JSONL file in LongBench's format."
        ) from error
    questions: list[Question] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        question = _question(line, f"{path}, line {number}", number)
        if question.id in seen:
            raise InvalidInputError(
                f"{path}, line {number}: the id {question.id!r} was used on line "
                f"{seen[question.id]} already; ids must differ."
            )
        seen[question.id] = number
        questions.append(question)
    if not questions:
        raise InvalidInputError(f"{path} is empty; it needs one JSON object a line.")
    return Dataset(path.stem, questions, ordered=True)


def _question(line: str, where: str, number: int) -> Question:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{where}: not JSON ({error}); mend or remove the line.") from error
    if not isinstance(entry, Mapping):
        raise InvalidInputError(f"{where}: a {type(entry).__name__}; give a JSON object.")
    text, context = (_text(entry, key, where) for key in ("input", "context"))
    answers = entry.get("answers")
    if isinstance(answers, str):
        answers = [answers]
    if not (
        isinstance(answers, list)
        and answers
        and all(isinstance(answer, str) and answer.strip() for answer in answers)
    ):
        raise InvalidInputError(
            f"{where}: 'answers' is {answers!r}, but must be a list of at least one text."
        )
    passages = tuple(Passage(part) for part in split_context(context))
    metadata = {key: entry[key] for key in ("dataset", "language") if key in entry}
    identity = str(entry.get("_id") or entry.get("id") or number)
    return Question(identity, text, tuple(answers), passages, metadata)


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InvalidInputError(
            f"{where}: {key!r} is {value!r}, but must be a text; LongBench's fields are input, "
            "context and answers."
        )
    return value.strip()


def split_context(context: str) -> list[str]:
    r"""Return the passages of a context, cut at headings like "Passage 3:" if there are any.

    >>> split_context("Passage 1:\nAnn\nAnn is tall.\nPassage 2:\nBob\nBob is not.")
    ['Ann\nAnn is tall.', 'Bob\nBob is not.']
    >>> split_context("One long story.")
    ['One long story.']
    """
    if not _HEADING.search(context):
        return [context]
    return [part.strip() for part in _HEADING.split(context) if part.strip()]
