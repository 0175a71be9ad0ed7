"""Synthetic needle tasks, RULER-like (arXiv 2404.06654): only reading the passages helps.

Passages are short reports in plain English. One or several sentences in them answer the question;
no model can know them from its weights.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping

from ifkv.errors import InvalidInputError
from ifkv.evaluation.questions import Dataset, Passage, Question

QUESTIONS = 500
PASSAGES = 8
SENTENCES = 7

_PLACES = (
    "harbour", "library", "mill", "orchard", "observatory", "station", "market", "quarry",
    "lighthouse", "museum", "bakery", "theatre", "garden", "workshop", "ferry", "school",
)  # fmt: skip
_PEOPLE = ("The keeper", "A visitor", "The clerk", "An engineer", "The gardener", "A student")
_DEEDS = (
    "wrote a long letter about the weather", "repaired the old clock in the hall",
    "counted the boxes twice before noon", "walked along the wall until it was dark",
    "asked for a second cup of tea", "painted the shutters in the same colour as before",
    "carried the ladder back to the yard", "read yesterday's newspaper aloud",
    "waited for the rain to stop", "left the keys with a neighbour",
)  # fmt: skip
_THINGS = (
    "amber", "basalt", "cedar", "dahlia", "ember", "fennel", "garnet", "hazel", "indigo", "juniper",
    "kestrel", "lantern", "marble", "nettle", "opal", "poplar", "quartz", "raven", "saffron",
    "thistle", "umber", "violet", "willow", "yarrow",
)  # fmt: skip


def _report(draws: random.Random) -> list[str]:
    """Return sentences that no question asks about."""
    place = draws.choice(_PLACES)
    return [
        f"{draws.choice(_PEOPLE)} at the {place} {draws.choice(_DEEDS)}." for _ in range(SENTENCES)
    ]


def _number(draws: random.Random) -> str:
    return str(draws.randrange(10_000, 100_000))


def _place_into(
    draws: random.Random, sentences: list[str], only: int | None = None
) -> list[Passage]:
    """Return reports with the sentences hidden in different ones.

    Args:
        draws: Random source of the places.
        sentences: Sentences to hide.
        only: Number of sentences, from the first, that the answer needs; all if None.
    """
    needed = len(sentences) if only is None else only
    hosts = draws.sample(range(max(PASSAGES, len(sentences))), len(sentences))
    passages = []
    for index in range(max(PASSAGES, len(sentences))):
        text, gold = _report(draws), False
        if index in hosts:
            which = hosts.index(index)
            text.insert(draws.randrange(1, SENTENCES), sentences[which])
            gold = which < needed
        passages.append(Passage(" ".join(text), f"Report {index + 1}", gold))
    return passages


def _needle(draws: random.Random) -> tuple[str, tuple[str, ...], list[Passage]]:
    """Make a question for one number of one word."""
    thing, number = draws.choice(_THINGS), _number(draws)
    hidden = [f"The special number for {thing} is {number}."]
    return f"What is the special number for {thing}?", (number,), _place_into(draws, hidden)


def _multikey(draws: random.Random) -> tuple[str, tuple[str, ...], list[Passage]]:
    """Make a question for one number of one word, among numbers of other words."""
    things = draws.sample(_THINGS, 4)
    numbers = [_number(draws) for _ in things]
    hidden = [
        f"The special number for {thing} is {number}."
        for thing, number in zip(things, numbers, strict=True)
    ]
    passages = _place_into(draws, hidden, only=1)
    return f"What is the special number for {things[0]}?", (numbers[0],), passages


def _multivalue(draws: random.Random) -> tuple[str, tuple[str, ...], list[Passage]]:
    """Make a question for three numbers of one word, each in another passage."""
    thing = draws.choice(_THINGS)
    numbers = [_number(draws) for _ in range(3)]
    hidden = [f"One of the special numbers for {thing} is {number}." for number in numbers]
    passages = _place_into(draws, hidden)
    answer = ", ".join(numbers)
    return f"What are the three special numbers for {thing}?", (answer,), passages


def _chain(draws: random.Random) -> tuple[str, tuple[str, ...], list[Passage]]:
    """Make a question for a value passed from word to word, each step in another passage."""
    things = draws.sample(_THINGS, 3)
    number = _number(draws)
    hidden = [f"The special number for {things[0]} is {number}."]
    hidden += [
        f"The special number for {after} is the same as for {before}."
        for before, after in itertools.pairwise(things)
    ]
    passages = _place_into(draws, hidden)
    return f"What is the special number for {things[-1]}?", (number,), passages


TASKS: Mapping[str, Callable[[random.Random], tuple[str, tuple[str, ...], list[Passage]]]] = {
    "needle": _needle,
    "needle-multikey": _multikey,
    "needle-multivalue": _multivalue,
    "needle-chain": _chain,
}
"""Functions that make one question, by task: question, answers, passages."""


def synthetic(name: str, *, seed: int = 0, questions: int = QUESTIONS) -> Dataset:
    """Return a synthetic data set.

    Args:
        name: One of ``TASKS``.
        seed: Seed of everything in it.
        questions: Number of questions.

    Returns:
        The data set; its pool has reports to draw further distractors from.

    Raises:
        InvalidInputError: The name is unknown.

    >>> question = synthetic("needle", questions=1).questions[0]
    >>> question.answers[0] in " ".join(passage.text for passage in question.passages)
    True
    """
    if name not in TASKS:
        raise InvalidInputError(f"task {name!r} is unknown; choose one of {', '.join(TASKS)}.")
    made = []
    for index in range(questions):
        text, answers, passages = TASKS[name](random.Random(f"{seed}/{name}/{index}"))
        made.append(Question(f"{name}-{index}", text, answers, tuple(passages)))
    draws = random.Random(f"{seed}/{name}/pool")
    pool = [Passage(" ".join(_report(draws)), f"Report {PASSAGES + i + 1}") for i in range(400)]
    return Dataset(name, made, pool)
