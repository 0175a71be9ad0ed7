"""How texts become documents of token ids: pieces of a fixed length, or of about the same one.

Ids are the contract: a piece is cut from the ids of a text, never from text that would be tokenised
again, so that the pieces one after another are the text's own ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ifkv.checks import check_positive


def fixed_length(documents: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Cut the concatenation of documents into pieces of ``length`` tokens, the last one shorter.

    Raises:
        InvalidInputError: The length is not positive.

    >>> fixed_length([[1, 2, 3], [4, 5]], 2)
    [[1, 2], [3, 4], [5]]
    """
    check_positive(length, "the length of a split")
    ids = [token for document in documents for token in document]
    return [ids[start : start + length] for start in range(0, len(ids), length)]


def at_most(document: Sequence[int], length: int) -> list[list[int]]:
    """Cut one document into as few pieces of at most ``length`` tokens as there can be.

    They are as equal as they can be: a last piece of three tokens would have seen next to nothing
    when it was encoded.

    Raises:
        InvalidInputError: The length is not positive.

    >>> at_most([1, 2, 3, 4, 5, 6, 7], 3)
    [[1, 2, 3], [4, 5], [6, 7]]
    >>> at_most([1, 2, 3], 3)
    [[1, 2, 3]]
    """
    check_positive(length, "split")
    count = -(-len(document) // length)
    size, longer = divmod(len(document), max(count, 1))
    bounds = [index * size + min(index, longer) for index in range(count + 1)]
    return [list(document[start:stop]) for start, stop in pairwise(bounds)]
