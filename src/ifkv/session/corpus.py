"""The documents of a store that a session can answer from: all, a named part, the fitting ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.documents.source import Source
from ifkv.errors import (
    DocumentNotFoundError,
    InvalidInputError,
    StoreCorruptionError,
    StoreWarning,
)
from ifkv.patching.handle import handle_of
from ifkv.session.prompt_format import check_question
from ifkv.session.retrieval import Retriever
from ifkv.store import DiskStore, DocumentStore, TieredStore, document_key
from ifkv.utils.listing import as_list

if TYPE_CHECKING:
    from ifkv.session.engine import Engine

# How many names a refusal gives as examples.
_SHOWN = 5


class Corpus:
    """Documents that a session's store holds for its model and prefix.

    Args:
        engine: The session's.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._searched: tuple[tuple[str, ...], Retriever] | None = None

    def stored(self, only: str | Sequence[str] | None) -> list[str]:
        """Return keys; see [ifkv.Session.stored][]."""
        patterns = None if only is None else _patterns(only)
        store = self._engine.library.store
        identity = handle_of(self._engine.model).identity(self._engine.model)
        prefix_key = _prefix_key(identity, torch.tensor(self._engine.prefix_ids, dtype=torch.long))
        kinds = list(_kinds(store))
        fitting = {key for key, kind in kinds if kind == (identity, prefix_key)} - {prefix_key}
        if not fitting:
            raise InvalidInputError(
                f"the store holds {len(kinds)} entries, and none is a document that this model "
                "encoded behind this prefix. Encode documents with the same model, dtype, prompt "
                "and store."
            )
        sources = self._engine.catalog.find(None)
        if patterns is not None:
            for pattern in patterns:
                if not any(_matches(sources.get(key, []), pattern) for key in fitting):
                    raise InvalidInputError(_nothing_named(pattern, fitting, sources))
            fitting = {
                key
                for key in fitting
                if any(_matches(sources.get(key, []), pattern) for pattern in patterns)
            }
        return sorted(fitting, key=lambda key: (_place(sources.get(key)), key))

    def retrieve(self, question: str, count: int, documents: Sequence[str] | None) -> list[str]:
        """Return keys; see [ifkv.Session.retrieve][]."""
        check_question(question)
        keys = list(dict.fromkeys(self._engine.library.named(documents)))
        if self._searched is None or self._searched[0] != tuple(keys):
            texts = [self._text(key) for key in keys]
            self._searched = tuple(keys), Retriever(texts)
        found = self._searched[1].best(question, count)
        return [keys[index] for index in reversed(found)]

    def _text(self, key: str) -> str:
        (document,) = self._engine.library.get([key], lazy=True)
        text: str = self._engine.tokenizer.decode(document.token_ids)
        return text


def _patterns(only: str | Sequence[str]) -> list[str]:
    """Return the patterns that a caller gives, as a list.

    Raises:
        InvalidInputError: There is none, or one is no text.
    """
    wanted = "give a pattern such as 'notes/*', or a list of them"
    patterns: list[Any] = [only] if isinstance(only, str) else as_list(only, "only", wanted)
    if not patterns or not all(isinstance(each, str) and each for each in patterns):
        raise InvalidInputError(f"only is {only!r}; {wanted}.")
    return patterns


def _kinds(store: DocumentStore) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """Yield each entry of a store: its key, its model's fingerprint and its prefix's key."""
    while isinstance(store, TieredStore):
        store = store.slow
    if isinstance(store, DiskStore):
        for entry in store.entries():
            if entry.key in store:  # those of another codec are not served
                yield entry.key, (entry.fingerprint, entry.prefix_key)
        return
    for key in list(store.keys()):
        try:
            document = store.get(key, lazy=True)
        except DocumentNotFoundError:
            continue  # dropped meanwhile
        except StoreCorruptionError as error:
            warnings.warn(f"{error}", StoreWarning, stacklevel=4)
            continue
        fingerprint = document.fingerprint
        yield key, (fingerprint, _prefix_key(fingerprint, document.prefix_ids))


def _prefix_key(fingerprint: str, prefix_ids: Tensor) -> str | None:
    """Return the key of a prefix's own rows; None without a prefix."""
    if not len(prefix_ids):
        return None
    return document_key(fingerprint, prefix_ids[:0], prefix_ids)


def _matches(sources: Sequence[Source], pattern: str) -> bool:
    return any(
        fnmatchcase(name, pattern)
        for source in sources
        for name in (source.title, source.location, str(source), source.place)
        if name
    )


def _nothing_named(pattern: str, keys: set[str], sources: dict[str, list[Source]]) -> str:
    """Return the refusal for a name that no document has."""
    names = sorted(
        {source.location or source.title for key in keys for source in sources.get(key, [])}
    )
    if not names:
        return (
            f"no document is named {pattern!r}: nobody has said where the {len(keys)} documents "
            "are from. Encode them again, which computes nothing anew, "
            "or add() them with sources."
        )
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"no document's title or path matches {pattern!r}; there are {', '.join(names[:_SHOWN])}"
        f"{more}. * stands for any letters."
    )


def _place(sources: Sequence[Source] | None) -> tuple[bool, str, str, int, int, int]:
    """Return the sort key of a document: its file, then its place in the file."""
    if not sources:
        return (True, "", "", 0, 0, 0)
    first = sources[0]
    return (
        False,
        first.location,
        first.title,
        first.page or 0,
        first.line or 0,
        first.offset or 0,
    )
