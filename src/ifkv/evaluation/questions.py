"""Data sets: questions, the passages they are asked over, and their answers."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Sequence
from typing import Any

from ifkv.errors import InvalidInputError
from ifkv.utils.checks import check_positive


@dataclasses.dataclass(frozen=True)
class Passage:
    """Text that becomes one document.

    Attributes:
        text: The text, without its title.
        title: Title, put on its own line before the text if there is one.
        gold: True if the data set says that the answer needs it.
    """

    text: str
    title: str = ""
    gold: bool = False

    @property
    def document(self) -> str:
        """Return the document's text: title, line break, text."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclasses.dataclass(frozen=True)
class Question:
    """Question with its answers and passages.

    Attributes:
        id: Unique within its data set.
        text: The question.
        answers: Right answers; the likelihood of the first is measured.
        passages: Passages it is asked over, in order.
        metadata: Other facts of the data set about it.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Data set: questions, and passages that any of them may get as distractors.

    Attributes:
        name: Name in results.
        questions: All questions.
        pool: Passages to draw distractors from, besides a question's own.
        ordered: True if the order of a question's passages matters and is kept.
        passages: Default number of passages of a question; None for all of its own.
    """

    name: str
    questions: Sequence[Question]
    pool: Sequence[Passage] = ()
    ordered: bool = False
    passages: int | None = None

    @property
    def digest(self) -> str:
        """Return a short hash of the content, the same for equal contents."""
        held = hashlib.sha256()
        for part in (*self.questions, *self.pool):
            held.update(repr(part).encode())
        return held.hexdigest()[:16]


def draw(
    dataset: Dataset, *, limit: int | None = None, passages: int | None = None, seed: int = 0
) -> list[Question]:
    """Choose questions, and the passages that each is asked over.

    Questions are chosen by shuffling all of them, so a larger limit only adds questions. The
    passages of a question depend on the seed and its id, not on other questions. They always
    include those that the answer needs.

    Args:
        dataset: The data set.
        limit: Largest number of questions; all if None.
        passages: Number of passages of each question, drawn from its own and then from the data
            set's pool; the data set's default if None.
        seed: Seed of the choice of questions and passages, and of their order.

    Returns:
        The questions.

    Raises:
        InvalidInputError: The data set is empty, or a question cannot have that many passages, or
            that few.

    >>> pool = [Passage(f"Nothing {i}.") for i in range(9)]
    >>> asked = Question("a", "Who?", ("Ann",), (Passage("Ann did.", gold=True),))
    >>> [chosen] = draw(Dataset("made up", [asked], pool), passages=3)
    >>> len(chosen.passages), sum(passage.gold for passage in chosen.passages)
    (3, 1)
    """
    for value, what in ((limit, "limit"), (passages, "passages")):
        if value is not None:
            check_positive(value, what)
    if not dataset.questions:
        raise InvalidInputError(f"{dataset.name} has no questions; give a file that has some.")
    chosen = list(dataset.questions)
    random.Random(seed).shuffle(chosen)
    count = dataset.passages if passages is None else passages
    return [_with_passages(dataset, question, count, seed) for question in chosen[:limit]]


def _with_passages(dataset: Dataset, question: Question, count: int | None, seed: int) -> Question:
    own = list(question.passages)
    draws = random.Random(f"{seed}/{question.id}")
    if count is not None and count != len(own):
        own = _drawn(dataset, question, count, draws)
    if not dataset.ordered:
        draws.shuffle(own)
    return dataclasses.replace(question, passages=tuple(own))


def _drawn(dataset: Dataset, question: Question, count: int, draws: random.Random) -> list[Passage]:
    gold = [passage for passage in question.passages if passage.gold]
    others = [passage for passage in question.passages if not passage.gold]
    if not gold:
        raise InvalidInputError(
            f"{dataset.name} does not say which passages of question {question.id!r} its answer "
            "needs, so none can be left out or added; leave the number of passages out."
        )
    if count < len(gold):
        raise InvalidInputError(
            f"question {question.id!r} needs {len(gold)} passages for its answer, but {count} were "
            f"asked for; ask for {len(gold)} at least."
        )
    wanted = count - len(gold)
    kept = sorted(draws.sample(range(len(others)), min(wanted, len(others))))
    found = [others[i] for i in kept]
    texts = {passage.text for passage in question.passages}
    # Some of the sample may be the question's own passages, so it is larger than what is missing.
    spare = draws.sample(range(len(dataset.pool)), min(wanted + len(texts), len(dataset.pool)))
    for index in spare:
        if len(found) == wanted:
            break
        if dataset.pool[index].text not in texts:
            texts.add(dataset.pool[index].text)
            found.append(dataclasses.replace(dataset.pool[index], gold=False))
    if len(found) < wanted:
        raise InvalidInputError(
            f"question {question.id!r} has {len(gold) + len(found)} passages to be asked over, but "
            f"{count} were asked for; ask for fewer."
        )
    return gold + found
