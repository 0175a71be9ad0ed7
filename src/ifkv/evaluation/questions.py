"""What a data set is made of: questions, the passages they are asked over, and their answers."""

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
    """A text that becomes one document.

    Attributes:
        text: The text, without its title.
        title: Put on a line of its own before the text, if there is one.
        gold: Whether the answer needs it, as far as the data set says.
    """

    text: str
    title: str = ""
    gold: bool = False

    @property
    def document(self) -> str:
        """The document's text: title, line break, text."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: Unique within its data set.
        text: The question.
        answers: Answers that count as right; the first is the one whose likelihood is measured.
        passages: What it is asked over, in order.
        metadata: Whatever else the data set says of it.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Questions, and passages that any of them may be given as distractors.

    Attributes:
        name: What it is called in results.
        questions: All questions.
        pool: Passages to draw distractors from, beyond a question's own.
        ordered: Whether the order of a question's passages means something and is kept.
        passages: Passages a question gets if the caller does not say; None for all of its own.
    """

    name: str
    questions: Sequence[Question]
    pool: Sequence[Passage] = ()
    ordered: bool = False
    passages: int | None = None

    @property
    def digest(self) -> str:
        """A short name of what it holds, the same for equal contents."""
        held = hashlib.sha256()
        for part in (*self.questions, *self.pool):
            held.update(repr(part).encode())
        return held.hexdigest()[:16]


def draw(
    dataset: Dataset, *, limit: int | None = None, passages: int | None = None, seed: int = 0
) -> list[Question]:
    """Choose questions, and the passages each is asked over.

    Questions are chosen by shuffling them all, so that a larger limit only adds to a smaller one.
    What a question is given depends on the seed and its id, not on the other questions. Passages
    that its answer needs are always among them.

    Args:
        dataset: The data set.
        limit: How many questions at most; all if None.
        passages: How many passages each, drawn from its own and then from the data set's pool;
            the data set's own number if None.
        seed: Decides which questions, which passages, and in which order.

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
    # A sample larger than what is missing, since some of it may be the question's own passages.
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
