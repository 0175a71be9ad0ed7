"""Inputs of a stitched cache: documents that belong together, their order and positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ifkv.cache.layer import capacity_for
from ifkv.cache.layout import Layout, layout
from ifkv.cache.prefix_difference import prefix_difference
from ifkv.documents.cache import DocumentCache
from ifkv.documents.checks import check_prefix, check_rows
from ifkv.errors import FingerprintMismatchError, InvalidInputError
from ifkv.patching.handle import PatchHandle, handle_of
from ifkv.utils.checks import whole_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class StitchPlan:
    """A request's documents, checked, arranged and placed.

    Attributes:
        documents: In the order in which they are stitched.
        order: The index of each of them among the documents given.
        placed: Their slots and positions.
    """

    documents: list[DocumentCache]
    order: list[int]
    placed: Layout

    @classmethod
    def checked(
        cls,
        model: PreTrainedModel,
        documents: Sequence[DocumentCache],
        order: Sequence[int] | None,
        geometry: str,
        *,
        sample: bool = True,
    ) -> StitchPlan:
        """Build a plan from the arguments of [ifkv.stitch][]; raises its errors.

        If ``sample`` is False, the weights are not sampled and `check_weights` must follow.
        """
        handle = handle_of(model)
        handle.rope.check_frequencies()
        check_documents(model, handle, documents, sample=sample)
        arranged = _arrange(documents, order)
        ordered = [documents[i] for i in arranged]
        placed = layout(
            len(ordered[0].prefix_ids),
            [len(document) for document in ordered],
            geometry,
            [document.positions_taken for document in ordered],
            [document.offsets for document in ordered],
        )
        handle.rope.check_length(placed.extent, "the stitched context")
        return cls(ordered, arranged, placed)

    def check_weights(self, model: PreTrainedModel) -> None:
        """Refuse documents that were made by other numbers than the weights have now."""
        _check_made_by(handle_of(model).identity(model), self.first, "document 0")

    @property
    def first(self) -> DocumentCache:
        """Return the first document, whose dtype and shape all documents share."""
        return self.documents[0]

    @property
    def parts(self) -> list[DocumentCache]:
        """Return everything that has rows, in order: the prefix, if any, and the documents."""
        prefix = self.first.prefix
        return ([] if prefix is None else [prefix]) + self.documents

    @property
    def capacity(self) -> int:
        """Return the number of slots to allocate."""
        return capacity_for(self.placed.length)


def _arrange(documents: Sequence[DocumentCache], order: Sequence[int] | None) -> list[int]:
    arranged = list(range(len(documents))) if order is None else whole_numbers(order, "order")
    if sorted(arranged) != list(range(len(documents))):
        raise InvalidInputError(
            f"order is {arranged}, but must name each of the {len(documents)} documents once, "
            "counting from 0."
        )
    return arranged


def _check_made_by(identity: str, document: DocumentCache, what: str) -> None:
    if document.fingerprint != identity:
        raise FingerprintMismatchError(
            f"{what} was made by model {document.fingerprint[:8]}, this one is {identity[:8]}: "
            "other weights, dtype or rope configuration. Prefill it again."
        )


def check_documents(
    model: PreTrainedModel,
    handle: PatchHandle,
    documents: Sequence[DocumentCache],
    *,
    sample: bool = True,
) -> None:
    """Refuse documents that do not belong to the model or to one another."""
    if isinstance(documents, DocumentCache) or not isinstance(documents, Sequence):
        raise InvalidInputError(
            f"documents is of type {type(documents).__name__}; a list of what prefill_documents "
            "returned is wanted."
        )
    if not documents:
        raise InvalidInputError("no documents to stitch; give at least one.")
    identity = handle.identity(model, sample=sample)
    for index, document in enumerate(documents):
        if not isinstance(document, DocumentCache):
            raise InvalidInputError(
                f"document {index} is of type {type(document).__name__}; stitch takes what "
                "prefill_documents returned."
            )
        _check_made_by(identity, document, f"document {index}")
        first = documents[0]
        known = document.prefix is first.prefix and document.prefix_ids is first.prefix_ids
        if index == 0 or not known:
            _check_prefix(identity, document, first, index)
        check_rows(document, f"document {index}")
        _check_alike(document, first, index)


def _check_prefix(identity: str, document: DocumentCache, first: DocumentCache, index: int) -> None:
    """Refuse a document whose prefix is not the first document's, or lacks the right rows."""
    if not torch.equal(document.prefix_ids, first.prefix_ids):
        its, other = prefix_difference(document.prefix_ids, first.prefix_ids)
        raise FingerprintMismatchError(
            f"document {index} was encoded behind the prefix {its}, document 0 behind {other}; a "
            "request has one prefix. Prefill them behind the same."
        )
    check_prefix(document, f"document {index}")
    held = document.prefix
    if held is None:
        return
    if held.fingerprint != identity:
        raise FingerprintMismatchError(
            f"the prefix of document {index} was made by model {held.fingerprint[:8]}, this one is "
            f"{identity[:8]}. Prefill the documents again."
        )
    _check_alike(held, first, index)


def _check_alike(part: DocumentCache, first: DocumentCache, index: int) -> None:
    if part.dtype != first.dtype or part.shape[:2] != first.shape[:2]:
        raise InvalidInputError(
            f"document {index} or its prefix holds {part.dtype} {part.shape}, document 0 "
            f"{first.dtype} {first.shape}; those of one request have the same layers, heads and "
            "dtype. Use documents as prefill_documents made them."
        )
