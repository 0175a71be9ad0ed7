"""Texts that become documents: checked all at once, and named by their place in the list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ifkv.documents.source import Source, check_sources
from ifkv.patching.handle import handle_of
from ifkv.session.splitting import pieces_of
from ifkv.utils.checks import naming
from ifkv.utils.listing import as_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.session.prompt_format import PromptFormat

WANTED = "give a list of documents, for example [text]"


def document_pieces(
    model: PreTrainedModel,
    layout: PromptFormat,
    prefix_ids: list[int],
    texts: Any,
    split: int | None,
    sources: Any = None,
) -> tuple[list[list[int]], list[str], list[Source | None]]:
    """Return the documents that texts become, and what to call each.

    Args:
        model: A patched model.
        layout: How its requests are laid out.
        prefix_ids: What documents are encoded behind.
        texts: The texts, as a caller gave them.
        split: Tokens of a document at most; None makes every text a document.
        sources: Where each text is from, as a caller said it.

    Returns:
        Token ids of each document: the pieces of the first text, then those of the second. For
        each "document 3", or "document 3, piece 1", counting texts from 0. And where it is from.

    Raises:
        InvalidInputError: ``texts`` is no list of texts; or one of them, which is named by its
            index, is none, blank, or longer than the model's positions; or ``sources`` are not
            one for each.
    """
    rope = handle_of(model).rope
    given = as_list(texts, "texts", WANTED)
    documents: list[list[int]] = []
    names: list[str] = []
    origins: list[Source | None] = []
    for index, (text, source) in enumerate(
        zip(given, check_sources(sources, len(given)), strict=True)
    ):
        with naming(f"document {index}"):
            pieces = pieces_of(layout, text, split)
        for ids, offset, part in pieces:
            whole = part == (1, 1)
            names.append(f"document {index}" + ("" if whole else f", piece {part[0]}"))
            rope.check_length(
                len(prefix_ids) + len(ids),
                f"{names[-1]} ({len(ids)} tokens) with its prefix",
                "Let long texts be cut into shorter documents: add(texts, split=512), for example.",
            )
            documents.append(ids)
            origins.append(source if source is None or whole else source.piece(text, offset, part))
    return documents, names, origins
