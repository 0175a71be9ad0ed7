"""How passages become documents of token ids: one each, or pieces of a fixed length.

Ids are the contract: a fixed-length piece is cut from the ids of the passages one after another,
never from text that would be tokenised again.
"""

from __future__ import annotations

from collections.abc import Sequence

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
