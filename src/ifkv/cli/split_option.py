"""Cut the texts that command lines name into documents that fit the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ifkv.documents.source import Source
    from ifkv.generation.settings import GenerationSettings
    from ifkv.session.prompt_format import PromptFormat

Split = Annotated[
    int | None,
    typer.Option(
        help="Cut longer texts into documents of at most this many tokens, such as 512, at "
        "headings, paragraphs and sentences. Default: one document per text.",
        min=1,
        show_default=False,
    ),
]
# Number of texts that a refusal names.
_NAMED = 5


class CutDocument(NamedTuple):
    """Document of a command line: its name in messages, its tokens and its source."""

    name: str
    ids: list[int]
    source: Source


def cut(
    layout: PromptFormat,
    config: PretrainedConfig,
    texts: Sequence[tuple[Source, str]],
    split: int | None,
    surrogate: Sequence[str] | None = None,
) -> list[CutDocument]:
    """Return the documents that texts become, cut as [ifkv.Session.add][] cuts them.

    Args:
        layout: Layout of the model's requests.
        config: The model's config.
        texts: Source and text of each.
        split: Largest number of tokens of a document; None makes every text one document.
        surrogate: Texts of the surrogate context that documents are encoded behind, or None.

    Returns:
        The documents; pieces of one text are numbered.

    Raises:
        InvalidInputError: A document is longer than the model's positions allow, or cannot be
            tokenized for it; the message names it.
    """
    from ifkv.models.rope import position_limit
    from ifkv.session.splitting import pieces_of
    from ifkv.utils.checks import naming

    documents: list[CutDocument] = []
    for source, text in texts:
        title = source.place
        with naming(title):
            pieces = pieces_of(layout, text, split)
        highest = max(max(piece.ids, default=0) for piece in pieces)
        if highest >= config.vocab_size:
            raise InvalidInputError(
                f"{title} becomes the token id {highest}, but this model's ids run from 0 to "
                f"{config.vocab_size - 1}; give the model's own tokenizer."
            )
        for ids, offset, part in pieces:
            if part == (1, 1):
                documents.append(CutDocument(title, ids, source))
            else:
                name = f"{title} ({part[0]} of {part[1]})"
                documents.append(CutDocument(name, ids, source.piece(text, offset, part)))
    limit, reason = position_limit(config)
    prefix = len(layout.prefix_ids())
    standing_in = max((len(layout.document_ids(text)) for text in surrogate or ()), default=0)
    room = limit - prefix - standing_in
    if room < 1:
        raise InvalidInputError(
            f"a text of --surrogate has {standing_in} tokens and leaves documents no position, "
            f"since {reason} and the prefix takes {prefix}; give a shorter text."
        )
    long = [f"{name} has {len(ids)} tokens" for name, ids, _ in documents if len(ids) > room]
    if long:
        beside = f" and the surrogate context {standing_in}" if standing_in else ""
        more = [f"{len(long) - _NAMED} more are too long"] if len(long) > _NAMED else []
        raise InvalidInputError(
            f"{', '.join(long[:_NAMED] + more)}; a document can have {room} here, since {reason} "
            f"and the prefix takes {prefix}{beside}. Cut long files into documents of at most N "
            f"tokens with --split N, for example --split {min(512, room)}."
        )
    return documents


def check_request(
    layout: PromptFormat,
    config: PretrainedConfig,
    documents: Sequence[Sequence[int]],
    question: str,
    settings: GenerationSettings,
) -> None:
    """Refuse a question over more documents than the model has positions for.

    Args:
        layout: Layout of the model's requests.
        config: The model's config.
        documents: Token ids of each.
        question: The question.
        settings: Settings of the answer, which needs room too.

    Raises:
        InvalidInputError: The documents are too many, or leave the answer no room.
    """
    from ifkv.models.rope import position_limit

    limit, reason = position_limit(config)
    tokens = sum(len(ids) for ids in {tuple(ids) for ids in documents})
    context, prompt = tokens + len(layout.prefix_ids()), len(layout.prompt_ids(question))
    if (needed := context + prompt) > limit:
        raise InvalidInputError(
            f"the documents have {tokens} tokens in all and take {needed} positions with prefix "
            f"and question, but {reason}. Ask over fewer: other files, a part of a store with "
            "--only, or those whose words fit the question with --retrieve N."
        )
    settings.new_tokens(context, prompt)  # refuses a lack of room for the answer
