"""Checks that the parts of a document belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    from ifkv.documents.cache import DocumentCache


def check_rows(document: DocumentCache, what: str) -> None:
    """Refuse a document that does not have one row of keys and values for each of its tokens.

    The rows of a lazy document are not read: its store has checked them against its header.

    Args:
        document: A document, or a prefix.
        what: Its name in the message.

    Raises:
        InvalidInputError: Its shapes or dtypes contradict each other, or its extent is shorter
            than its tokens.
    """
    if document.images is None and document.positions_taken < len(document):
        raise InvalidInputError(
            f"{what} has {len(document)} tokens and the extent {document.extent}, so its positions "
            "would overlap the next document's; give an extent of at least its length."
        )
    if document.lazy:
        return
    keys, values = document.keys, document.values
    if (
        keys.ndim != 4
        or keys.shape != values.shape
        or keys.dtype != values.dtype
        or keys.shape[2] != len(document)
    ):
        raise InvalidInputError(
            f"{what} has {len(document)} tokens, keys {keys.dtype} {tuple(keys.shape)} and values "
            f"{values.dtype} {tuple(values.shape)}, but both must be [layers, kv_heads, tokens, "
            "head_dim] of one dtype. Use documents as prefill_documents made them."
        )


def check_prefix(document: DocumentCache, what: str) -> None:
    """Refuse a document whose ``prefix`` does not hold the rows of its ``prefix_ids``.

    Args:
        document: The document.
        what: Its name in the message.

    Raises:
        InvalidInputError: The rows are missing, of other tokens, or contradict each other.
    """
    held = document.prefix
    if (held is None) != (len(document.prefix_ids) == 0) or (
        held is not None and not torch.equal(held.token_ids, document.prefix_ids)
    ):
        count, wanted = 0 if held is None else len(held), len(document.prefix_ids)
        raise InvalidInputError(
            f"{what} was encoded behind {wanted} prefix tokens but its .prefix holds the rows of "
            f"{count}{' other tokens' if count == wanted else ''}; keep .prefix as "
            "prefill_documents made it."
        )
    if held is not None:
        check_rows(held, f"the prefix of {what}")
