"""Text of single tokens, whose pieces join to the decoded text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

# Decoding puts this in the place of bytes that are no complete character.
_REPLACEMENT = "\ufffd"


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token; joined, they are ``tokenizer.decode(ids)``.

    A character whose bytes are spread over several tokens belongs to the last of them, and the
    others are empty. Tokens are decoded beside their neighbours, since some decoders strip the
    first space of a text and some put one before each word.

    Args:
        tokenizer: A tokenizer from transformers.
        ids: Token ids, ``n`` of them.

    Returns:
        ``n`` strings.
    """
    ids = list(ids)
    whole: str = tokenizer.decode(ids)
    pieces = _through_a_window(tokenizer, ids)
    if "".join(pieces) == whole:
        return pieces
    return _through_prefixes(tokenizer, ids, whole)


def _through_a_window(tokenizer: Any, ids: list[int]) -> list[str]:
    """Decode each token behind the last complete piece only: linear in the number of tokens."""
    pieces: list[str] = []
    first = shown = 0  # ids[first:shown] are context for the piece that begins at `shown`
    for end in range(1, len(ids) + 1):
        before: str = tokenizer.decode(ids[first:shown])
        text: str = tokenizer.decode(ids[first:end])
        if text.endswith(_REPLACEMENT) and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        first, shown = shown, end
    return pieces


def _through_prefixes(tokenizer: Any, ids: list[int], whole: str) -> list[str]:
    """Cut the whole text where the decoded prefixes stop agreeing with it.

    Exact for every tokenizer, also one that tidies spaces up afterwards, but quadratic.
    """
    cuts = [0]
    for end in range(1, len(ids)):
        text: str = tokenizer.decode(ids[:end])
        same = next(
            (index for index, (a, b) in enumerate(zip(text, whole, strict=False)) if a != b),
            min(len(text), len(whole)),
        )
        cuts.append(max(cuts[-1], same))
    cuts.append(len(whole))
    return [whole[a:b] for a, b in pairwise(cuts)] if ids else []
