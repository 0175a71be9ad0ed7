"""Claims on documents that are being made: threads that want the same one wait for the first."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ifkv.store.protocol import DocumentStore


class Claims:
    """Keys of a store that threads of this process are making documents for.

    A waiting thread holds no claim, so no two threads wait for each other. A claim ends whether its
    document was made or not; if not, a waiting thread claims it.

    Attributes:
        ended: Number of batches of claims that have ended.
    """

    def __init__(self) -> None:
        self.ended = 0
        self._changed = threading.Condition()
        self._held: set[str] = set()

    @contextlib.contextmanager
    def some_of(
        self, wanted: Sequence[tuple[str, Tensor]], budget: int
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """Claim documents that no other thread is making, in order; if there are none, wait once.

        Args:
            wanted: Keys and token ids ``[n]`` of the documents to be made.
            budget: Tokens to claim at most; a single longer document may exceed it.

        Yields:
            The documents claimed until the ``with`` ends. None after a wait: other threads have
            then made some, or given up.
        """
        mine: list[tuple[str, Tensor]] = []
        size = 0
        with self._changed:
            free = [each for each in wanted if each[0] not in self._held]
            for each in free:
                size += len(each[1])
                if mine and size > budget:
                    break
                mine.append(each)
            if not mine:
                self._changed.wait()
            self._held.update(key for key, _ in mine)
        try:
            yield mine
        finally:
            if mine:
                with self._changed:
                    self._held.difference_update(key for key, _ in mine)
                    self.ended += 1
                    self._changed.notify_all()


_lock = threading.Lock()
_by_place: dict[Any, Claims] = {}
_by_store: weakref.WeakKeyDictionary[Any, Claims] = weakref.WeakKeyDictionary()


def claims_of(store: DocumentStore) -> Claims:
    """Return the claims of a store's place, shared by this process's objects that opened it."""
    while (slow := getattr(store, "slow", None)) is not None:
        store = slow
    codec = getattr(getattr(store, "codec", None), "name", "")
    place = getattr(store, "path", None) or getattr(store, "url", None)
    with _lock:
        if place is not None:
            return _by_place.setdefault((str(place), codec), Claims())
        try:
            return _by_store.setdefault(store, Claims())
        except TypeError:  # a store class without weak references or hash
            return _by_place.setdefault(id(store), Claims())


def _forget() -> None:
    """Drop all claims in a forked child, which has no other threads."""
    global _lock
    _lock = threading.Lock()
    _by_place.clear()
    _by_store.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
