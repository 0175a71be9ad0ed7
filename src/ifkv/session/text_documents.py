"""Texts that become documents: checked all at once, and named by their place in the list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ifkv.documents.source import Source, check_sources
from ifkv.documents.surrogate import SurrogateContext, before_documents
from ifkv.errors import InvalidInputError
from ifkv.patching.handle import handle_of
from ifkv.session.splitting import pieces_of
from ifkv.utils.checks import naming
from ifkv.utils.listing import as_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.session.prompt_format import PromptFormat

SURROGATE_WANTED = "give a text, a list of texts, or None to encode documents alone"
WANTED = "give a list of documents, for example [text]"


def document_pieces(
    model: PreTrainedModel,
    layout: PromptFormat,
    prefix_ids: list[int],
    texts: Any,
    split: int | None,
    sources: Any = None,
    surrogate: SurrogateContext | None = None,
) -> tuple[list[list[int]], list[str], list[Source | None]]:
    """Return the documents that texts become, and what to call each.

    Args:
        model: A patched model.
        layout: How its requests are laid out.
        prefix_ids: What documents are encoded behind.
        texts: The texts, as a caller gave them.
        split: Tokens of a document at most; None makes every text a document.
        sources: Where each text is from, as a caller said it.
        surrogate: Surrogate context that documents are encoded behind, or None.

    Returns:
        Token ids of each document: the pieces of the first text, then those of the second. For
        each "document 3", or "document 3, piece 1", counting texts from 0. And where it is from.

    Raises:
        InvalidInputError: ``texts`` is no list of texts; or one of them, which is named by its
            index, is none, blank, or longer than the model's positions; or ``sources`` are not
            one for each.
    """
    rope = handle_of(model).rope
    before, what = before_documents(prefix_ids, surrogate)
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
                before + len(ids),
                f"{names[-1]} ({len(ids)} tokens) {what}",
                "Let long texts be cut into shorter documents: add(texts, split=512), for example.",
            )
            documents.append(ids)
            origins.append(source if source is None or whole else source.piece(text, offset, part))
    return documents, names, origins


def surrogate_of_texts(
    model: PreTrainedModel, layout: PromptFormat, prefix_ids: list[int], given: Any
) -> SurrogateContext | None:
    """Return the surrogate context of texts, tokenised as documents are.

    Args:
        model: A patched model.
        layout: Layout of its requests.
        prefix_ids: Tokens that documents are encoded behind.
        given: A text, a list of texts, or None, as a caller gave it.

    Returns:
        The surrogate context, or None.

    Raises:
        InvalidInputError: There is no text, one is no text, blank or given twice, or one leaves
            documents no position.
    """
    if given is None:
        return None
    texts = [given] if isinstance(given, str) else as_list(given, "surrogate", SURROGATE_WANTED)
    if not texts:
        raise InvalidInputError(f"surrogate is an empty list; {SURROGATE_WANTED}.")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            found = "blank" if isinstance(text, str) else f"of type {type(text).__name__}"
            raise InvalidInputError(f"a text of surrogate is {found}; {SURROGATE_WANTED}.")
    context = SurrogateContext.of(model, [layout.document_ids(text) for text in texts])
    handle_of(model).rope.check_length(
        len(prefix_ids) + context.longest + 1,
        f"a document of one token behind the prefix and a surrogate of {context.longest} tokens",
        "Give a shorter text.",
    )
    return context.shared()
