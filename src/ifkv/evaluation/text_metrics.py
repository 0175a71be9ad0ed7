"""Token F1 and exact match, as in LongBench (arXiv 2308.14508) and SQuAD (arXiv 1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> list[str]:
    """Return the words of an answer: lower case, without punctuation and articles.

    >>> normalise("The Eiffel Tower, in Paris!")
    ['eiffel', 'tower', 'in', 'paris']
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(answer: str, gold: str) -> float:
    """Return the harmonic mean of precision and recall over words; 0 if either side has no words.

    >>> token_f1("in the year 1889", "1889")
    0.5
    """
    given, wanted = normalise(answer), normalise(gold)
    common = sum((Counter(given) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    # 2PR/(P + R) with P = common/given, R = common/wanted.
    return 2 * common / (len(given) + len(wanted))


def exact_match(answer: str, gold: str) -> float:
    """Return 1 if both have the same words in the same order, else 0.

    >>> exact_match("The lamp.", "lamp"), exact_match("a red lamp", "lamp")
    (1.0, 0.0)
    """
    return float(normalise(answer) == normalise(gold))


def best(metric: Callable[[str, str], float], answer: str, golds: Sequence[str]) -> float:
    """Return the best value of a metric over the right answers."""
    return max(metric(answer, gold) for gold in golds)
