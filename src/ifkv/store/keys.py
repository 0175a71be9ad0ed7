"""Keys of documents: hashes of everything that decides keys and values, and nothing else."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ifkv.errors import DocumentNotFoundError, InvalidInputError

# torch is imported where it is used, because listing a store's keys should not take seconds.
if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ifkv.documents.cache import DocumentCache
    from ifkv.documents.surrogate import SurrogateContext, Texts

# Part of every key: an entry of another format version is never found, let alone misread.
FORMAT_VERSION = 1
KEY_PATTERN = re.compile(r"[0-9a-f]{64}")


def document_key(
    fingerprint: str, prefix_ids: Tensor, token_ids: Tensor, surrogate: str | None = None
) -> str:
    """Compute SHA-256 over format version, fingerprint, prefix, document and surrogate context.

    Each part is preceded by its length, so that no two lists of parts run into the same bytes.

    Args:
        fingerprint: Identity of the model.
        prefix_ids: Long ``[P]``.
        token_ids: Long ``[n]``.
        surrogate: Identity of the surrogate context; None if the document was encoded alone,
            whose key has no such part.

    Returns:
        64 hex digits.
    """
    digest = hashlib.sha256(f"ifkv document {FORMAT_VERSION}\n".encode())
    parts = [fingerprint.encode(), _id_bytes(prefix_ids), _id_bytes(token_ids)]
    if surrogate is not None:
        parts.append(surrogate.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def key_of(document: DocumentCache) -> str:
    """Return the key of a document that has been made.

    Raises:
        InvalidInputError: It has pictures, which token ids do not tell apart.
    """
    _refuse_pictures(document)
    behind = None if document.surrogate is None else document.surrogate.identity
    return document_key(document.fingerprint, document.prefix_ids, document.token_ids, behind)


def prefix_key_of(document: DocumentCache) -> str | None:
    """Return the key of the prefix's rows, or None without a prefix."""
    if len(document.prefix_ids) == 0:
        return None
    return document_key(document.fingerprint, document.prefix_ids[:0], document.prefix_ids)


def key_for(
    model: PreTrainedModel,
    token_ids: Sequence[int] | Tensor,
    prefix: Sequence[int] | Tensor | DocumentCache = (),
    surrogate: SurrogateContext | Texts | None = None,
) -> str:
    """Return the key of the document that a model would make of these tokens.

    Args:
        model: A patched model.
        token_ids: The document's tokens, ``[n]``.
        prefix: The tokens it is encoded behind, or the ``.prefix`` of documents made earlier.
        surrogate: As in [ifkv.prefill_documents][].

    Returns:
        64 hex digits.

    Raises:
        NotPatchedError: The model is not patched.
        InvalidInputError: The ids are not a document's.
    """
    from ifkv.documents.cache import DocumentCache
    from ifkv.documents.surrogate import SurrogateContext
    from ifkv.patching.handle import handle_of
    from ifkv.utils.checks import token_tensor

    behind = prefix.token_ids if isinstance(prefix, DocumentCache) else prefix
    standing_in = None if surrogate is None else SurrogateContext.of(model, surrogate).identity
    return document_key(
        handle_of(model).identity(model),
        token_tensor(model, behind, "the prefix", empty=True),
        token_tensor(model, token_ids, "the document"),
        standing_in,
    )


def check_key(key: object) -> str:
    """Return a key if it has a key's form; no other string reaches a file system.

    Raises:
        DocumentNotFoundError: It has another form, so it is in no store.
    """
    if not isinstance(key, str) or KEY_PATTERN.fullmatch(key) is None:
        raise DocumentNotFoundError(
            f"{str(key)[:80]!r} is no document's key; keys are 64 hex digits, as put() and "
            "key_for() return them."
        )
    return key


def check_document(document: DocumentCache) -> None:
    """Refuse a document whose parts contradict each other, before it is stored.

    Raises:
        InvalidInputError: Shapes, dtypes or the prefix do not belong together.
    """
    import torch

    from ifkv.documents.cache import DocumentCache
    from ifkv.documents.checks import check_prefix, check_rows

    if not isinstance(document, DocumentCache):
        raise InvalidInputError(
            f"a {type(document).__name__} was put; stores take what prefill_documents returned."
        )
    check_rows(document, "the document")
    _refuse_pictures(document)
    if document.positions_taken != len(document):
        raise InvalidInputError(
            f"the document has {len(document)} tokens and takes {document.positions_taken} "
            "positions, which no store can hold yet; keep it in memory."
        )
    if len(document) == 0:
        raise InvalidInputError("the document has no token; stores take documents that have some.")
    measured = document.sensitivity
    if measured is not None and (
        measured.dtype != torch.float32
        or measured.shape != document.token_ids.shape
        or not bool(torch.isfinite(measured).all())
        or bool((measured < 0).any())
    ):
        raise InvalidInputError(
            f"the document's sensitivity is {measured.dtype} {tuple(measured.shape)} for "
            f"{len(document.token_ids)} tokens; it must be float32, one finite number of at least "
            "0 for each, as measure_sensitivities returns it, or None."
        )
    check_prefix(document, "the document")
    prefix = document.prefix
    if prefix is not None and (
        prefix.prefix is not None
        or len(prefix.prefix_ids) != 0
        or prefix.fingerprint != document.fingerprint
        or prefix.shape[:2] != document.shape[:2]
        or prefix.shape[3:] != document.shape[3:]
        or prefix.dtype != document.dtype
    ):
        raise InvalidInputError(
            f"the document's prefix {prefix!r} is not what {document!r} was encoded behind; keep "
            ".prefix as prefill_documents made it."
        )


def _refuse_pictures(document: DocumentCache) -> None:
    if document.images is not None:
        raise InvalidInputError(
            "a document with pictures cannot be kept in a store yet: its token ids are those of "
            "every picture of the same size. Keep it in memory, and stitch it from there."
        )


def _id_bytes(ids: Tensor) -> bytes:
    return ids.detach().cpu().numpy().astype("<i8").tobytes()
