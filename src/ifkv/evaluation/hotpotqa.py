"""HotpotQA (arXiv 1809.09600), distractor setting: two passages answer, eight only look alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ifkv.evaluation.questions import Dataset, Passage, Question


def hotpotqa(content: Sequence[Mapping[str, Any]]) -> Dataset:
    """Return the questions of the official file's content.

    Args:
        content: The parsed JSON: a list of ``_id``, ``question``, ``answer``,
            ``supporting_facts`` and ``context`` as ``[[title, [sentences]], ...]``.

    Returns:
        The data set. Questions with fewer paragraphs than others can get some of theirs.

    Raises:
        KeyError, TypeError, ValueError: The content has another format.
    """
    questions = []
    pool: dict[str, Passage] = {}
    for entry in content:
        needed = {title for title, _ in entry["supporting_facts"]}
        passages = tuple(
            Passage("".join(sentences).strip(), title, title in needed)
            for title, sentences in entry["context"]
            if "".join(sentences).strip()
        )
        pool.update((passage.text, passage) for passage in passages)
        questions.append(
            Question(
                id=str(entry["_id"]),
                text=entry["question"].strip(),
                answers=(entry["answer"],),
                passages=passages,
                metadata={key: entry[key] for key in ("type", "level") if key in entry},
            )
        )
    return Dataset("hotpotqa", questions, list(pool.values()))
