"""Splitting of texts into documents: whole, or cut where a reader would cut them.

Texts are cut at headings, paragraphs, sentences and words by semantic-text-splitter; each piece is
then a text of its own, tokenised alone as every document is. Evaluation cuts ids, at fixed lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ifkv.errors import InvalidInputError
from ifkv.utils.checks import check_positive

if TYPE_CHECKING:
    from ifkv.session.prompt_format import PromptFormat


class Piece(NamedTuple):
    """Piece of a text that becomes one document.

    Attributes:
        ids: Its token ids.
        offset: Characters before it in its text.
        part: Which piece of the text it is, from 1, and of how many.
    """

    ids: list[int]
    offset: int
    part: tuple[int, int]


def pieces_of(layout: PromptFormat, text: str, split: int | None) -> list[Piece]:
    """Return the documents that a text becomes.

    Args:
        layout: How requests are laid out; it tokenises documents.
        text: The text.
        split: Tokens of a document at most; None makes the text one document.

    Raises:
        InvalidInputError: It is no text, or cannot be cut into pieces that small.
    """
    if split is not None:
        check_positive(split, "split")
    ids = layout.document_ids(text)
    if split is None or len(ids) <= split:
        return [Piece(ids, 0, (1, 1))]
    cut = at_boundaries(text, split, lambda piece: len(layout.document_ids(piece)))
    return [
        Piece(layout.document_ids(piece), offset, (number, len(cut)))
        for number, (offset, piece) in enumerate(cut, 1)
    ]


def at_boundaries(text: str, length: int, count: Callable[[str], int]) -> list[tuple[int, str]]:
    r"""Cut a text at the largest boundaries that leave pieces of at most ``length`` tokens.

    Boundaries are Markdown's headings, blocks and lines, then sentences, words and characters; as
    many neighbours as fit make a piece. Nothing is lost but white space where it is cut.

    Args:
        text: The text.
        length: Tokens of a piece at most.
        count: The tokens of a piece, which is never blank.

    Returns:
        Each piece, with the characters that stand before it; none is blank.

    Raises:
        InvalidInputError: A single character has more tokens.

    >>> at_boundaries("# One\n\nA lamp. A door.\n\n# Two\n\nRain.", 16, len)
    [(0, '# One'), (7, 'A lamp. A door.'), (24, '# Two\n\nRain.')]
    """
    from semantic_text_splitter import MarkdownSplitter

    def size(piece: str) -> int:
        return count(piece) if piece.strip() else 0

    # Counts of tokens do not always grow with the text: a piece that turns out too long is cut
    # again, with less room.
    pieces, room = [(0, text)], length
    while long := [piece for _, piece in pieces if size(piece) > length]:
        if len(long[0]) == 1 or room == 0:
            raise InvalidInputError(
                f"split is {length}, but {long[0][:20]!r} alone takes {size(long[0])} tokens with "
                "the blank line that ends a document; give a larger split."
            )
        splitter = MarkdownSplitter.from_callback(size, room)
        pieces = [
            (offset + start, cut)
            for offset, piece in pieces
            for start, cut in (
                splitter.chunk_indices(piece) if size(piece) > length else [(0, piece)]
            )
            if cut.strip()
        ]
        room -= 1
    return pieces


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
