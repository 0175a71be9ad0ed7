"""Runs of a matrix of ways over questions, which continue where an earlier run stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ifkv.errors import IfkvError, InvalidInputError
from ifkv.evaluation.questions import Dataset, Question
from ifkv.evaluation.results_log import Ledger, only_run
from ifkv.evaluation.setup import Bench
from ifkv.evaluation.trial import Trial
from ifkv.evaluation.ways import Way
from ifkv.patching.handle import handle_of

# Version of the results; raise it when their meaning changes, so that old and new are not mixed.
FORMAT = 1
# A mistake in the setup fails every question; the run stops after this many.
_GIVE_UP_AFTER = 3


@dataclasses.dataclass(frozen=True)
class Run:
    """Result of one run.

    Attributes:
        ledger: The folder with all results, including those of earlier runs.
        seconds: Wall time of each question asked in this run.
        failures: Error of each question that failed.
    """

    ledger: Ledger
    seconds: list[float]
    failures: dict[str, str]


def settings_of(bench: Bench, dataset: Dataset, **further: Any) -> dict[str, Any]:
    """Return the settings that all results in a folder share.

    Args:
        bench: Model and layout.
        dataset: Data set of the questions.
        **further: Other settings of the questions: seed, passages.
    """
    model: Any = bench.model
    text = bench.format.prefix_text + "\0" + bench.tokenizer.decode(bench.format.prompt_ids("?"))
    if bench.layout.get("control_tokens", "text") != "text":
        text += "\0" + bench.layout["control_tokens"]
    return {
        "format": FORMAT,
        "model": handle_of(model).identity(model),
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "layout": hashlib.sha256(text.encode()).hexdigest()[:16],
        "data": dataset.name,
        "digest": dataset.digest,
        "split": bench.split,
        "short_answer": bench.short_answer,
        "max_new_tokens": bench.max_new_tokens,
        **further,
    }


def run(
    bench: Bench,
    questions: Sequence[Question],
    ways: Sequence[Way],
    folder: Path,
    *,
    settings: dict[str, Any],
    answers: bool = True,
    advance: Callable[[int, str], None] = lambda done, text: None,
) -> Run:
    """Measure the ways and questions that the folder lacks.

    Args:
        bench: Model and layout.
        questions: The questions; ids must differ.
        ways: The ways of answering each.
        folder: Folder of the results.
        settings: From `settings_of`; a folder made with others is refused.
        answers: True to decode answers too, which takes longer than everything else.
        advance: Called after every way with the number of ways done, and a note on the current
            work.

    Returns:
        Result of the run. A question that fails with one of our errors is named there, and asked
        again by the next run.

    Raises:
        InvalidInputError: The settings differ, questions share an id, none can be asked, or another
            run is writing into the folder.
    """
    ids = [question.id for question in questions]
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise InvalidInputError(f"two questions have the id {twice!r}; ids must differ.")
    with only_run(folder):
        ledger = Ledger(folder, settings)
        return _measure(bench, questions, ways, ledger, answers=answers, advance=advance)


def _measure(
    bench: Bench,
    questions: Sequence[Question],
    ways: Sequence[Way],
    ledger: Ledger,
    *,
    answers: bool,
    advance: Callable[[int, str], None],
) -> Run:
    """Measure what the ledger lacks, question by question."""
    done = Run(ledger, [], {})
    for number, question in enumerate(questions, start=1):
        keys = [way.key for way in ways]
        missing = set(ledger.missing(question.id, keys, answers=answers))
        advance(len(ways) - len(missing), f"question {number} of {len(questions)}")
        if not missing:
            continue
        started = time.perf_counter()
        try:
            trial = Trial(bench, question)
            results = []
            for result in trial.measure([w for w in ways if w.key in missing], answers=answers):
                results.append(result)
                advance(1, f"question {number} of {len(questions)}, {result.way.key}")
        except IfkvError as error:
            done.failures[question.id] = str(error)
            if not done.seconds and len(done.failures) == min(_GIVE_UP_AFTER, len(questions)):
                raise InvalidInputError(
                    f"none of the first {len(done.failures)} questions could be asked; the last, "
                    f"{question.id!r}: {error}"
                ) from error
            continue
        except Exception as error:
            error.add_note(
                f"while question {question.id!r} was asked; results are in {ledger.folder}"
            )
            raise
        ledger.add(question.id, trial.reference, results)
        done.seconds.append(time.perf_counter() - started)
    return done
