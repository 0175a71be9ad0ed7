"""Token ids of several documents: lists, tensors, or a tokenizer's output.

A tokenizer that pads makes all rows equally long, and nothing in the ids themselves tells padding
from text. So rows of one tensor need the tokenizer's attention mask, and lists that look padded are
refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.documents.cache import DocumentCache
from ifkv.documents.images import ImageDocument
from ifkv.errors import InvalidInputError
from ifkv.utils.checks import token_tensor
from ifkv.utils.listing import as_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WANTED = "give a list of documents, each a sequence of token ids"
_ONES = (
    "attention_mask=, as the tokenizer returned it (all ones if nothing is padded), or tokenise "
    "without padding"
)


def no_padding(documents: Sequence[Sequence[int] | Tensor]) -> list[Tensor]:
    """Return an attention mask that marks every token as text, also those that look padded."""
    return [torch.ones(len(ids), dtype=torch.long) for ids in documents]


def document_tensors(
    model: PreTrainedModel,
    documents: Any,
    attention_mask: Any = None,
    names: Sequence[str] | None = None,
    *,
    pictures: bool = False,
) -> list[Tensor]:
    """Return the token ids of every document, without padding.

    Args:
        model: The model.
        documents: Token ids of each document; a tensor ``[documents, tokens]``, with a mask; or
            what a tokenizer returned for several texts, which brings its mask along.
        attention_mask: 1 where a token is a document's, 0 where it is padding,
            ``[documents, tokens]``.
        names: Name of each document in a refusal; "document 3", say, if None.
        pictures: Accept documents with pictures.

    Returns:
        Long ``[tokens]`` for each document, on the CPU.

    Raises:
        InvalidInputError: They are no documents, one of them (named by its index) is empty or
            holds an id outside the vocabulary, or they are padded and there is no mask.
    """
    given = documents
    if isinstance(given, Mapping) and "input_ids" in given:
        attention_mask = given.get("attention_mask") if attention_mask is None else attention_mask
        given = given["input_ids"]
        if len(given) and isinstance(given[0], int):
            raise InvalidInputError(
                "documents is what a tokenizer returned for one text; tokenise a list of texts, or "
                "give [its['input_ids']]."
            )
    if isinstance(given, DocumentCache):
        raise InvalidInputError(f"documents is of type DocumentCache; {_WANTED}.")
    if getattr(given, "ndim", None) == 2:
        if attention_mask is None and len(given) > 1:
            raise InvalidInputError(
                f"documents has the shape {tuple(given.shape)}: rows that are equally long, as "
                f"padding makes them. Give {_ONES} and give a list."
            )
        rows = list(given)
    else:
        rows = as_list(given, "documents", _WANTED)
    if any(isinstance(row, ImageDocument) for row in rows):
        if not pictures:
            raise InvalidInputError(
                "documents with pictures (ifkv.ImageDocument) can only be made by "
                "ifkv.prefill_documents and kept in memory: stores and sessions go by token ids, "
                "which are the same for all pictures of one size."
            )
        if attention_mask is not None:
            raise InvalidInputError(
                "an attention mask was given beside documents with pictures, which have no "
                "padding; leave it out."
            )
    if attention_mask is not None:
        rows = _unpadded(rows, attention_mask)
    named = names or [f"document {index}" for index in range(len(rows))]
    tokens = [
        token_tensor(model, ids.token_ids, name, pictures=True)
        if isinstance(ids, ImageDocument)
        else token_tensor(model, ids, name)
        for ids, name in zip(rows, named, strict=True)
    ]
    if attention_mask is None:
        _check_unpadded(model, tokens)
    return tokens


def _unpadded(rows: Sequence[Any], attention_mask: Any) -> list[Tensor]:
    """Return rows without the tokens that the mask leaves out.

    Raises:
        InvalidInputError: The mask does not fit the rows, or leaves out more than their ends.
    """
    masks = as_list(
        list(attention_mask) if getattr(attention_mask, "ndim", 1) == 2 else attention_mask,
        "attention_mask",
        "give one row for each document",
    )
    if len(masks) != len(rows):
        raise InvalidInputError(
            f"attention_mask has {len(masks)} rows for {len(rows)} documents; give one each."
        )
    kept = []
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        ids, seen = (torch.as_tensor(each).detach().cpu() for each in (row, mask))
        if ids.shape != seen.shape or ids.ndim != 1:
            raise InvalidInputError(
                f"document {index} has the shape {tuple(ids.shape)}, but its row of attention_mask "
                f"{tuple(seen.shape)}; one number for each token is wanted."
            )
        if not bool(((seen == 0) | (seen == 1)).all()):
            raise InvalidInputError(
                f"attention_mask of document {index} holds other numbers than 0 and 1."
            )
        places = seen.nonzero()[:, 0]
        if len(places) and len(places) != int(places[-1] - places[0]) + 1:
            raise InvalidInputError(
                f"attention_mask of document {index} has a gap between its tokens; a document's "
                "tokens follow one another, and padding stands before or behind them."
            )
        kept.append(ids[seen.bool()])
    return kept


def _check_unpadded(model: PreTrainedModel, tokens: Sequence[Tensor]) -> None:
    """Refuse rows whose ends look like padding to the length of the longest.

    Such rows have one length, and some begin or end with longer runs of padding ids than others.

    Raises:
        InvalidInputError: They look like that.
    """
    if len(tokens) < 2 or len({len(ids) for ids in tokens}) > 1:
        return
    padding = _padding_ids(model)
    for flipped in (False, True):
        runs = []
        for ids in tokens:
            text = ~torch.isin(ids.flip(0) if flipped else ids, padding)
            runs.append(int(text.nonzero()[0]) if bool(text.any()) else len(ids))
        if max(runs) != min(runs):
            index = runs.index(max(runs))
            found = int(tokens[index][-1 if flipped else 0])
            raise InvalidInputError(
                f"all documents have {len(tokens[0])} tokens, and document {index} "
                f"{'ends' if flipped else 'begins'} with {runs[index]} times the id {found}, which "
                f"pads or ends texts of this model: padding would be taken for text. Give {_ONES}."
            )


def _padding_ids(model: PreTrainedModel) -> Tensor:
    """Return the ids that texts of a model are padded with: its own, or those that end texts."""
    found: list[Any] = []
    for config in (model.config, getattr(model, "generation_config", None)):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(config, name, None)
            found += value if isinstance(value, list | tuple) else [value]
    return torch.tensor([token for token in found if isinstance(token, int)], dtype=torch.long)
