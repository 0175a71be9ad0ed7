"""Finding the documents whose words fit a question, by BM25."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

from ifkv.errors import InvalidInputError
from ifkv.utils.checks import check_positive

_WORD = re.compile(r"\w+")


def load_bm25s() -> Any:
    """Return the package bm25s.

    Raises:
        InvalidInputError: It is not installed.
    """
    try:
        return importlib.import_module("bm25s")
    except ImportError as error:
        raise InvalidInputError(
            f"retrieving needs the package bm25s ({error}); pip install bm25s, or "
            "pip install -e '.[retrieve]' in the clone of ifkv."
        ) from error


class Retriever:
    """BM25 over texts, by their words in lower case; no word is left out or cut to its stem.

    Args:
        texts: The texts.

    Raises:
        InvalidInputError: bm25s is not installed.
    """

    def __init__(self, texts: Sequence[str]):
        words = [_words(text) for text in texts]
        self._count = len(words)
        self._index: Any = None
        if any(words):
            self._index = load_bm25s().BM25()
            self._index.index(words, show_progress=False)

    def best(self, question: str, count: int) -> list[int]:
        """Return which texts fit a question, at most ``count`` of them, the best first.

        Texts that share no word with the question are left out; of equals, the first is taken.

        Raises:
            InvalidInputError: ``count`` is not positive, or no text shares a word with it.
        """
        check_positive(count, "the number of documents to retrieve")
        asked = _words(question)
        scores = [0.0] * self._count
        if asked and self._index is not None:
            scores = self._index.get_scores(asked).tolist()
        ranked = sorted(range(self._count), key=lambda index: -scores[index])
        found = [index for index in ranked[:count] if scores[index] > 0]
        if not found:
            raise InvalidInputError(
                f"none of the {self._count} documents has a word of the question {question!r}; ask "
                "in their words, or name documents instead of retrieving them."
            )
        return found


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
