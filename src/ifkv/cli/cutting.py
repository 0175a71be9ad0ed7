"""Texts that command lines name become documents of token ids, none longer than the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ifkv.text import PromptFormat

Split = Annotated[
    int | None,
    typer.Option(
        help="Cut files that are longer into documents of at most so many tokens; 512, say. A file "
        "is one document if not given.",
        min=1,
        show_default=False,
    ),
]
# How many texts a refusal names.
_NAMED = 5


def cut(
    layout: PromptFormat,
    config: PretrainedConfig,
    texts: Sequence[tuple[str, str]],
    split: int | None,
) -> list[tuple[str, list[int]]]:
    """The documents that texts become, as :meth:`ifkv.Session.add` cuts them.

    Args:
        layout: How the model's requests are laid out.
        config: The model's config.
        texts: Where each is from, and its text.
        split: Tokens of a document at most; None makes every text a document.

    Returns:
        Where each document is from, and its token ids; pieces of one text are numbered.

    Raises:
        InvalidInputError: Documents are longer than the model's positions allow, or cannot be
            tokenised for it; it says which.
    """
    from ifkv.checks import naming
    from ifkv.rope import position_limit
    from ifkv.splitting import at_most

    documents: list[tuple[str, list[int]]] = []
    for title, text in texts:
        with naming(title):
            ids = layout.document_ids(text)
        if ids and max(ids) >= config.vocab_size:
            raise InvalidInputError(
                f"{title} becomes the token id {max(ids)}, but this model's ids run from 0 to "
                f"{config.vocab_size - 1}; give the model's own tokenizer."
            )
        pieces = [ids] if split is None else at_most(ids, split)
        documents += [
            (title if len(pieces) == 1 else f"{title} ({number} of {len(pieces)})", piece)
            for number, piece in enumerate(pieces, 1)
        ]
    limit, reason = position_limit(config)
    prefix = len(layout.prefix_ids())
    room = limit - prefix
    long = [f"{title} has {len(ids)} tokens" for title, ids in documents if len(ids) > room]
    if long:
        more = [f"{len(long) - _NAMED} more are too long"] if len(long) > _NAMED else []
        raise InvalidInputError(
            f"{', '.join(long[:_NAMED] + more)}; a document can have {room} here, since {reason} "
            f"and the prefix takes {prefix}. Cut long files into documents of at most N tokens "
            f"with --split N, for example --split {min(512, room)}."
        )
    return documents


def check_request(
    layout: PromptFormat,
    config: PretrainedConfig,
    documents: Sequence[tuple[str, list[int]]],
    question: str,
) -> None:
    """Refuse a question over more documents than the model has positions for.

    Raises:
        InvalidInputError: They are too many.
    """
    from ifkv.rope import position_limit

    limit, reason = position_limit(config)
    tokens = sum(len(ids) for ids in {tuple(ids) for _, ids in documents})
    needed = tokens + len(layout.prefix_ids()) + len(layout.prompt_ids(question))
    if needed > limit:
        raise InvalidInputError(
            f"the files have {tokens} tokens in all and take {needed} positions with prefix and "
            f"question, but {reason}. Ask over fewer files, or over those that a search finds for "
            "the question."
        )
