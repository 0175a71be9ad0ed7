"""The documents of a store that a session can answer from: all, a named part, the fitting ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

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
    from ifkv.documents.surrogate import SurrogateContext
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
        own = self._engine.library.surrogate
        behind = None if own is None else own.identity
        kinds = list(_kinds(store))
        made = {
            key: kind.surrogate
            for key, kind in kinds
            if (kind.fingerprint, kind.prefix_key) == (identity, prefix_key) and key != prefix_key
        }
        fitting = {key for key, surrogate in made.items() if surrogate == behind}
        if not fitting:
            raise InvalidInputError(_nothing_fits(len(kinds), list(made.values()), own))
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


class _Kind(NamedTuple):
    """What an entry of a store was made by and behind."""

    fingerprint: str
    prefix_key: str | None
    surrogate: str | None  # identity of the surrogate context


def _nothing_fits(entries: int, others: Sequence[str | None], own: SurrogateContext | None) -> str:
    """Return the refusal of a store without a document that a session can answer from.

    Args:
        entries: How many entries the store holds.
        others: The surrogate contexts of those that only differ in it.
        own: The session's.
    """
    if not others:
        return (
            f"the store holds {entries} entries, and none is a document that this model "
            "encoded behind this prefix. Encode documents with the same model, dtype, prompt "
            "and store."
        )
    found = f"{len(others)} document" + "s" * (len(others) > 1)
    theirs = "without one" if None in others else "behind another"
    wanted = "without a surrogate context" if own is None else f"behind the {own!r}"
    return (
        f"the store holds {found} that this model encoded behind this prefix, but "
        f"none {wanted}: they were encoded {theirs}. Give the surrogate context that they were "
        "encoded behind, or encode them anew."
    )


def _kinds(store: DocumentStore) -> Iterator[tuple[str, _Kind]]:
    """Yield each entry of a store: its key, and its kind."""
    while isinstance(store, TieredStore):
        store = store.slow
    if isinstance(store, DiskStore):
        for entry in store.entries():
            if entry.key in store:  # those of another codec are not served
                yield entry.key, _Kind(entry.fingerprint, entry.prefix_key, entry.surrogate)
        return
    for key in list(store.keys()):
        try:
            document = store.get(key, lazy=True)
        except DocumentNotFoundError:
            continue  # dropped meanwhile
        except StoreCorruptionError as error:
            warnings.warn(f"{error}", StoreWarning, stacklevel=4)
            continue
        fingerprint, surrogate = document.fingerprint, document.surrogate
        yield (
            key,
            _Kind(
                fingerprint,
                _prefix_key(fingerprint, document.prefix_ids),
                None if surrogate is None else surrogate.identity,
            ),
        )


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
