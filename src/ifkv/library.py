"""The documents that a session answers from: made once, kept in a store, found by key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ifkv.documents import DocumentCache, prefill_documents
from ifkv.errors import InvalidInputError
from ifkv.patching import handle_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.store import DocumentStore


class Library:
    """Documents of one model behind one prefix.

    Attributes:
        store: Where they are kept.
        keys: Keys of those that were added, in order, each once.

    Args:
        model: A patched model.
        store: Where documents are kept.
        prefix_ids: What each is encoded behind.
    """

    def __init__(self, model: PreTrainedModel, store: DocumentStore, prefix_ids: list[int]):
        self.store = store
        self.keys: list[str] = []
        self._model = model
        self._prefix_ids = prefix_ids
        self._prefix: DocumentCache | None = None

    def add(
        self, documents: Sequence[list[int]], *, batch_tokens: int | None, progress: bool
    ) -> list[str]:
        """Prefill documents that the store lacks, and keep them.

        Args:
            documents: Token ids of each.
            batch_tokens: As in :func:`ifkv.prefill_documents`.
            progress: Show a progress bar.

        Returns:
            Their keys, in order.
        """
        keys = [self.store.key_for(self._model, ids, self._prefix_ids) for ids in documents]
        missing = {
            key: ids for key, ids in zip(keys, documents, strict=True) if key not in self.store
        }
        made = prefill_documents(
            self._model,
            list(missing.values()),
            prefix=self._current_prefix() or self._prefix_ids,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        for document in made:
            self.store.put(document)
            self._prefix = document.prefix
        self.keys += [key for key in dict.fromkeys(keys) if key not in self.keys]
        return keys

    def get(self, keys: Sequence[str] | None) -> list[DocumentCache]:
        """Documents by key; all that were added if None.

        Raises:
            InvalidInputError: There is none, or one is not in the store.
        """
        if isinstance(keys, str):
            raise InvalidInputError(
                "documents is one string; give a list of keys, for example [key]."
            )
        wanted = self.keys if keys is None else list(keys)
        if not wanted:
            raise InvalidInputError("there is no document to answer from; call add([...]) first.")
        found = []
        for key in wanted:
            try:
                found.append(self.store.get(key))
            except KeyError:
                raise InvalidInputError(
                    f"document {key!r} is not in the store; add() its text again. Keys are what "
                    "add() returns."
                ) from None
        return found

    def _current_prefix(self) -> DocumentCache | None:
        """The prefix's rows, unless the model's weights have changed since they were made."""
        identity = handle_of(self._model).fingerprints.of(self._model)
        if self._prefix is not None and self._prefix.fingerprint != identity:
            self._prefix = None
        return self._prefix
