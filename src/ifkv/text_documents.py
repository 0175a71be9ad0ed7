"""Texts that become documents: checked all at once, and named by their place in the list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ifkv.checks import naming
from ifkv.listing import as_list
from ifkv.patching import handle_of
from ifkv.splitting import at_most

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.text import PromptFormat

WANTED = "give a list of documents, for example [text]"


def document_pieces(
    model: PreTrainedModel,
    layout: PromptFormat,
    prefix_ids: list[int],
    texts: Any,
    split: int | None,
) -> list[list[int]]:
    """Return the documents that texts become.

    Args:
        model: A patched model.
        layout: How its requests are laid out.
        prefix_ids: What documents are encoded behind.
        texts: The texts, as a caller gave them.
        split: Tokens of a document at most; None makes every text a document.

    Returns:
        Token ids of each document: the pieces of the first text, then those of the second.

    Raises:
        InvalidInputError: ``texts`` is no list of texts; or one of them, which is named by its
            index, is none, blank, or longer than the model's positions.
    """
    rope = handle_of(model).rope
    pieces: list[list[int]] = []
    for index, text in enumerate(as_list(texts, "texts", WANTED)):
        with naming(f"document {index}"):
            ids = layout.document_ids(text)
        cut = [ids] if split is None else at_most(ids, split)
        for number, piece in enumerate(cut, 1):
            which = f"document {index}" if len(cut) == 1 else f"document {index}, piece {number},"
            rope.check_length(
                len(prefix_ids) + len(piece),
                f"{which} ({len(piece)} tokens) with its prefix",
                "Let long texts be cut into shorter documents: add(texts, split=512), for example.",
            )
        pieces += cut
    return pieces
