"""The documents that a session answers from: made once, kept in a store, made again if lost."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ifkv.cache.prefix_difference import prefix_difference
from ifkv.documents.cache import DocumentCache
from ifkv.documents.prefill import prefill_documents
from ifkv.documents.sensitivity import with_sensitivities
from ifkv.documents.token_ids import no_padding
from ifkv.errors import (
    DocumentNotFoundError,
    DocumentUnreadableError,
    FingerprintMismatchError,
    InvalidInputError,
    StoreCorruptionError,
    StoreError,
    StoreUnavailableError,
    StoreWarning,
)
from ifkv.patching.handle import handle_of
from ifkv.store import TieredStore, document_key, encode_documents
from ifkv.utils.checks import naming_request
from ifkv.utils.listing import as_list
from ifkv.utils.progress import token_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.documents.surrogate import SurrogateContext
    from ifkv.store import DocumentStore

KEYS_WANTED = "give a list of keys, for example [key]"


# Several threads add to one library. One lock for all: it is held for a moment, and a library that
# has none of its own can be copied.
_COUNTING = threading.Lock()


class _Origin(NamedTuple):
    """Origin of a document, by which it can be made again."""

    token_ids: Tensor
    prefix_ids: Tensor
    surrogate: SurrogateContext | None
    sensitivities: bool  # whether they were measured

    def key(self, fingerprint: str) -> str:
        """Return the key of the document that a model makes of it."""
        behind = None if self.surrogate is None else self.surrogate.identity
        return document_key(fingerprint, self.prefix_ids, self.token_ids, behind)


class Library:
    """Documents of one model behind one prefix.

    Attributes:
        store: Store that keeps the documents.
        surrogate: Surrogate context that added documents are encoded behind, or None. Documents
            that are got by key may have been encoded behind another, or alone.
        keys: Keys of the documents that were added, in order, each once.
        prefilled: Number of documents that have been prefilled so far.

    Args:
        model: A patched model.
        store: Store that keeps the documents.
        prefix_ids: Tokens that every document is encoded behind.
        decode: Function from token ids to text, for error messages.
        surrogate: Surrogate context that added documents are encoded behind, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: DocumentStore,
        prefix_ids: list[int],
        decode: Callable[[list[int]], str] | None = None,
        surrogate: SurrogateContext | None = None,
    ):
        self.store = store
        self.surrogate = surrogate
        self.keys: list[str] = []
        self.prefilled = 0
        self._model = model
        self._prefix_ids = prefix_ids
        self._decode = decode
        self._prefix: DocumentCache | None = None
        self._origins: dict[str, _Origin] = {}

    def __copy__(self) -> Library:
        """Return a library that begins with the same documents."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, keys=list(self.keys), _origins=dict(self._origins))
        return twin

    def add(
        self,
        documents: Sequence[list[int]],
        *,
        names: Sequence[str],
        batch_tokens: int | None,
        sensitivities: bool,
        progress: bool,
    ) -> list[str]:
        """Prefill documents that the store lacks, and keep each batch as soon as it is made.

        Args:
            documents: Token ids of each.
            names: What to call each in an error.
            batch_tokens: As in [ifkv.prefill_documents][].
            sensitivities: As in `ifkv.store.encode_documents`.
            progress: Show a progress bar.

        Returns:
            Their keys, in order.
        """
        with token_bar("prefilling documents", shown=progress) as report:
            done = encode_documents(
                self._model,
                self.store,
                documents,
                attention_mask=no_padding(documents),
                prefix=self._current_prefix() or self._prefix_ids,
                surrogate=self.surrogate,
                batch_tokens=batch_tokens,
                sensitivities=sensitivities,
                on_progress=report,
                names=names,
            )
        behind = torch.tensor(self._prefix_ids, dtype=torch.long)
        with _COUNTING:
            self.prefilled += done.made
            self._prefix = done.prefix or self._prefix
            for key, ids in zip(done.keys, documents, strict=True):
                tokens = torch.tensor(ids, dtype=torch.long)
                self._origins[key] = _Origin(tokens, behind, self.surrogate, sensitivities)
            self.keys += [key for key in dict.fromkeys(done.keys) if key not in self.keys]
        return done.keys

    def named(self, keys: Sequence[str] | None) -> list[str]:
        """Return the keys that a caller gives; all that were added if None.

        Raises:
            InvalidInputError: There is none.
        """
        wanted = list(self.keys) if keys is None else as_list(keys, "documents", KEYS_WANTED)
        if not wanted and self.keys:
            raise InvalidInputError(
                "documents is an empty list; give at least one key that add() returned, or None "
                f"for all {len(self.keys)} that were added."
            )
        if not wanted:
            raise InvalidInputError("there is no document to answer from; call add([...]) first.")
        return wanted

    def get(
        self,
        keys: Sequence[str] | None,
        *,
        lazy: bool = False,
        made: Mapping[str, DocumentCache] | None = None,
    ) -> list[DocumentCache]:
        """Return documents by key; what the store cannot give is made again from its tokens.

        Args:
            keys: Which; all that were added if None.
            lazy: Let the store read layers when they are needed.
            made: Those that were just made again, and need no store.

        Raises:
            InvalidInputError: There is none, or one is not in the store and cannot be made.
            FingerprintMismatchError: One was encoded behind another prefix than the session's.
            DocumentUnreadableError: One cannot be had from the store and cannot be made.
        """
        found, have = [], dict(made or {})
        own = torch.tensor(self._prefix_ids, dtype=torch.long)
        for key in self.named(keys):
            try:
                document = have[key] if key in have else self.store.get(key, lazy=lazy)
            except (DocumentNotFoundError, DocumentUnreadableError) as error:
                document = have[key] = self.make_again(key, error)
            origin = _Origin(
                document.token_ids,
                document.prefix_ids,
                document.surrogate,
                document.sensitivity is not None,
            )
            self._origins.setdefault(key, origin)
            found.append(document)
            if not torch.equal(document.prefix_ids, own):
                its, ours = prefix_difference(document.prefix_ids, own, self._decode)
                raise FingerprintMismatchError(
                    f"document {key[:16]} was encoded behind the prefix {its}, this session asks "
                    f"behind {ours}; a request has one prefix. Add its text to this session, and "
                    "give the key that it returns."
                )
        return found

    def get_many(
        self,
        requests: Sequence[Sequence[str] | None],
        *,
        naming: Callable[[int], AbstractContextManager[None]] = naming_request,
    ) -> tuple[list[list[str]], dict[str, DocumentCache]]:
        """Return the documents of several requests, each once however many share it.

        Rows stay in the store until they are used, so that no more are held than are at work.

        Args:
            requests: For each its keys; all that were added if None.
            naming: Says in a refusal which request it is about.

        Returns:
            Each request's keys, and the documents by key.

        Raises:
            InvalidInputError: As of `get`, naming the request.
            DocumentUnreadableError: As of `get`.
        """
        wanted: list[list[str]] = []
        found: dict[str, DocumentCache] = {}
        for index, keys in enumerate(requests):
            with naming(index):
                own = self.named(keys)
                new = [key for key in dict.fromkeys(own) if key not in found]
                if new:
                    found.update(zip(new, self.get(new, lazy=True), strict=True))
                wanted.append(own)
        return wanted, found

    def make_again(self, key: str, error: StoreError) -> DocumentCache:
        """Prefill a document that the store cannot give from its tokens, put it, and say so.

        It is not put into a store that does not answer, which may have it, but kept near if the
        store has a faster tier.

        Args:
            key: Its key.
            error: Why the store cannot.

        Returns:
            The document as it was made, never read back.

        Raises:
            InvalidInputError: Its tokens are not known, or the model is not what it was.
            DocumentUnreadableError: Likewise, if it was corrupt or could not be read.
        """
        origin = self._origins.get(key)
        identity = handle_of(self._model).identity(self._model)
        if origin is None or origin.key(identity) != key:
            lacking = "its text is not known here" if origin is None else "the weights have changed"
            if isinstance(error, DocumentUnreadableError):
                cannot = "This session cannot"
                if isinstance(error, StoreUnavailableError):
                    cannot = "This session cannot prefill the document instead"
                raise type(error)(
                    f"{error} {cannot}: {lacking}. add() its text again.",
                    key=error.key,
                    reason=error.reason,
                ) from error
            raise InvalidInputError(
                f"document {key!r} is not in the store, and {lacking}; add() its text again. Keys "
                "are what add() returns."
            ) from None
        prefix = self._current_prefix()
        if prefix is None or not torch.equal(prefix.token_ids, origin.prefix_ids):
            behind: DocumentCache | Tensor = origin.prefix_ids
        else:
            behind = prefix
        made = prefill_documents(
            self._model, [origin.token_ids], prefix=behind, surrogate=origin.surrogate
        )
        (document,) = with_sensitivities(self._model, made) if origin.sensitivities else made
        with _COUNTING:
            self.prefilled += 1
        kept = self._keep(document, error)
        reason = "is no longer in the store"
        if isinstance(error, StoreCorruptionError):
            reason = f"could not be trusted ({error.reason})"
        elif isinstance(error, DocumentUnreadableError):
            reason = f"could not be read ({error.reason})"
        warnings.warn(
            f"document {key[:16]} {reason} and was prefilled again from its tokens.{kept}",
            StoreWarning,
            stacklevel=2,
        )
        return document

    def _keep(self, document: DocumentCache, error: StoreError) -> str:
        """Store a document that was made again; return a sentence if that failed."""
        try:
            if not isinstance(error, StoreUnavailableError):
                self.store.put(document)
            elif isinstance(self.store, TieredStore):
                self.store.promote(document)
        except StoreError as failure:
            return f" It could not be stored: {failure}"
        return ""

    def _current_prefix(self) -> DocumentCache | None:
        """Return the prefix's rows; None if the model's weights have changed since."""
        identity = handle_of(self._model).identity(self._model)
        if self._prefix is not None and self._prefix.fingerprint != identity:
            self._prefix = None
        return self._prefix
