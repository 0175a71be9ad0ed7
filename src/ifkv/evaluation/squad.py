"""SQuAD v2 (arXiv 1806.03822) as retrieval: a question's paragraph among others drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ifkv.evaluation.questions import Dataset, Passage, Question


def squad(content: Mapping[str, Any], *, unanswerable: bool = False) -> Dataset:
    """Return the questions of the official file's content.

    Args:
        content: The parsed JSON, with ``data``, ``paragraphs``, ``qas``.
        unanswerable: True to keep the questions that the paragraph does not answer; their answer is
            "unanswerable".

    Returns:
        The data set, by default with five passages per question.

    Raises:
        KeyError, TypeError: The content has another format.
    """
    questions, pool = [], []
    for article in content["data"]:
        title = article["title"].replace("_", " ")
        for paragraph in article["paragraphs"]:
            gold = Passage(paragraph["context"].strip(), title, gold=True)
            pool.append(gold)
            for entry in paragraph["qas"]:
                impossible = bool(entry.get("is_impossible"))
                if impossible and not unanswerable:
                    continue
                found = dict.fromkeys(answer["text"] for answer in entry["answers"])
                questions.append(
                    Question(
                        id=str(entry["id"]),
                        text=entry["question"].strip(),
                        answers=("unanswerable",) if impossible else tuple(found),
                        passages=(gold,),
                        metadata={"answerable": not impossible},
                    )
                )
    return Dataset("squad", questions, pool, passages=5)
