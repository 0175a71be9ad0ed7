"""Results of an evaluation in a folder: its settings, and one line per finished question.

A line is written whole and flushed before the next question begins. After an interruption, the next
run cuts off a partial line and asks its question again. One run writes into a folder at a time;
reading meanwhile is safe.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ifkv.errors import InvalidInputError
from ifkv.evaluation.ways import Reference, Result
from ifkv.utils.files import write_whole

SETTINGS = "settings.json"
RESULTS = "results.jsonl"
LOCK = ".lock"


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it does not exist.

    Two runs would measure the same questions, and one could cut off a line that the other is
    writing. The system frees the folder when the process ends, however it ends.

    Raises:
        InvalidInputError: Another run is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InvalidInputError(
            f"another evaluation is writing into {folder}; wait until it ends and run the same "
            "command again, or use another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


class Ledger:
    """Log of results in a folder, to which further ones can be added.

    Args:
        folder: The folder; made if it does not exist.
        settings: Settings that all its results share; for a run, inside of `only_run`. None opens a
            folder to read it, and changes nothing there.

    Attributes:
        settings: The folder's settings.
        references: Full prefill of each question, by the question's id.
        results: Measurements by question and way (`Way.key`).

    Raises:
        InvalidInputError: The folder's results were made with other settings, a line is broken, or
            there is nothing to read.
    """

    def __init__(self, folder: Path, settings: dict[str, Any] | None = None):
        self.folder = folder
        self.references: dict[str, dict[str, Any]] = {}
        self.results: dict[str, dict[str, dict[str, Any]]] = {}
        path = folder / SETTINGS
        if settings is None and not path.is_file():
            raise InvalidInputError(
                f"{folder} holds no evaluation; give the folder that `ifkv eval --out` wrote."
            )
        if path.is_file():
            found = _read_json(path)
            if settings is not None:
                _refuse_mixing(folder, found, settings)
            self.settings = found
        else:
            assert settings is not None
            write_whole(path, json.dumps(settings, indent=2) + "\n")
            self.settings = json.loads(json.dumps(settings))
        self._read(mend=settings is not None)

    def missing(self, question: str, keys: Sequence[str], *, answers: bool) -> list[str]:
        """Return the ways of a question that are still to be measured or lack a needed answer."""
        found = self.results.get(question, {})
        return [
            key
            for key in keys
            if key not in found or (answers and found[key].get("answer") is None)
        ]

    def add(self, question: str, reference: Reference, results: Sequence[Result]) -> None:
        """Append a question's line; it is on the disk when this returns."""
        line = {
            "question": question,
            "full": dataclasses.asdict(reference),
            "ways": [result.record() for result in results],
        }
        text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
        with (self.folder / RESULTS).open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        question = line["question"]
        self.references[question] = line["full"]
        found = self.results.setdefault(question, {})
        for way in line["ways"]:
            # Plain ratios have no label.
            found[f"{way['way']} @{way.get('budget') or format(way['ratio'], 'g')}"] = way

    def _read(self, *, mend: bool) -> None:
        path = self.folder / RESULTS
        if not path.is_file():
            return
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                self._take(json.loads(line))
            except (KeyError, TypeError, ValueError) as error:
                raise InvalidInputError(
                    f"{path}, line {number} is no result ({type(error).__name__} {error}); remove "
                    "the line, and its question is asked again."
                ) from error
        if mend and whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read: {error}; use another folder.") from error
    if not isinstance(found, dict):
        raise InvalidInputError(f"{path} holds no settings; use another folder.")
    return found


def _refuse_mixing(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    differing = [
        f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} now"
        for name in dict.fromkeys([*found, *wanted])
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise InvalidInputError(
            f"{folder} holds results made with other settings ({'; '.join(differing)}), which "
            "cannot be mixed; use another folder, or the same settings."
        )
