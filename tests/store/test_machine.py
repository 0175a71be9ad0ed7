"""Stores with a budget against a list in order of use, under any sequence of calls."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ifkv.errors import DocumentNotFoundError, StoreFullError
from ifkv.store import DiskStore, MemoryStore, key_of
from ifkv.testing import random_document
from stored_documents import same


class StoreMachine(RuleBasedStateMachine):
    """A store with a budget against a list in order of use."""

    def make(self, budget: int | None) -> MemoryStore | DiskStore:
        raise NotImplementedError

    @initialize(budget=st.sampled_from([None, 3, 6, 9]))
    def begin(self, budget: int | None) -> None:
        self.folder = Path(tempfile.mkdtemp())
        prefixes = [None, random_document(100, length=2), random_document(101, length=3)]
        self.documents = [
            random_document(i, length=2 + i, prefix=prefixes[i % 3], sensitivity=i % 2 == 0)
            for i in range(7)
        ]
        self.sizes = self.measure()
        unit = max(self.sizes.values())
        self.budget = None if budget is None else budget * unit // 2
        self.order: list[str] = []  # least recently used first
        self.pinned: set[str] = set()
        self.behind = {key_of(d): key_of(d.prefix) for d in self.documents if d.prefix is not None}
        self.store = self.make(self.budget)

    def measure(self) -> dict[str, int]:
        raise NotImplementedError

    def use(self, key: str) -> None:
        for name in (self.behind.get(key), key):
            if name is not None:
                if name in self.order:
                    self.order.remove(name)
                self.order.append(name)

    def model_put(self, key: str) -> bool:
        """One entry into the model; whether it fits."""
        if key not in self.order:
            keep = {key, self.behind.get(key)}
            order = list(self.order)
            while self.budget is not None and (
                sum(self.sizes[k] for k in order) + self.sizes[key] > self.budget
            ):
                needed = {self.behind.get(k) for k in order}
                free = [k for k in order if k not in keep | needed | self.pinned]
                if not free or self.sizes[key] > self.budget:
                    return False
                order.remove(free[0])
            self.order = order
        self.use(key)
        return True

    @rule(i=st.integers(0, 6))
    def put(self, i: int) -> None:
        document = self.documents[i]
        parts = [part for part in (document.prefix, document) if part is not None]
        fits = all(self.model_put(key_of(part)) for part in parts)
        if fits:
            assert self.store.put(document) == key_of(document)
        else:
            with pytest.raises(StoreFullError):
                self.store.put(document)

    @rule(i=st.integers(0, 6), lazy=st.booleans())
    def get(self, i: int, lazy: bool) -> None:
        key = key_of(self.documents[i])
        if key in self.order:
            same(self.store.get(key, lazy=lazy), self.documents[i])
            self.use(key)
        else:
            with pytest.raises(DocumentNotFoundError):
                self.store.get(key)

    @rule(i=st.integers(0, 8))
    def delete(self, i: int) -> None:
        prefixes = sorted(set(self.behind.values()))
        key = key_of(self.documents[i]) if i < 7 else prefixes[i - 7]
        if key not in self.order:
            with pytest.raises(DocumentNotFoundError):
                self.store.delete(key)
            return
        self.store.delete(key)
        gone = {key} | {k for k in self.order if self.behind.get(k) == key}
        self.order = [k for k in self.order if k not in gone]
        self.pinned -= gone

    @rule(i=st.integers(0, 6), pinned=st.booleans())
    def pin(self, i: int, pinned: bool) -> None:
        key = key_of(self.documents[i])
        if key not in self.order:
            with pytest.raises(DocumentNotFoundError):
                self.store.pin(key, pinned)
            return
        self.store.pin(key, pinned)
        (self.pinned.add if pinned else self.pinned.discard)(key)

    @rule()
    def reopen(self) -> None:
        if isinstance(self.store, DiskStore):
            self.store.close()
            self.store = self.make(self.budget)

    @invariant()
    def agrees(self) -> None:
        assert list(self.store.keys()) == self.order
        stats = self.store.stats()
        assert stats.nbytes == sum(self.sizes[key] for key in self.order)
        assert stats.pinned == len(self.pinned)
        assert self.budget is None or stats.nbytes <= self.budget
        for document in self.documents:
            assert (key_of(document) in self.store) == (key_of(document) in self.order)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            if isinstance(self.store, DiskStore):
                self.store.close()
            shutil.rmtree(self.folder)


class MemoryMachine(StoreMachine):
    def make(self, budget: int | None) -> MemoryStore:
        return MemoryStore(budget)

    def measure(self) -> dict[str, int]:
        parts = [*self.documents, *(d.prefix for d in self.documents if d.prefix is not None)]
        return {key_of(part): part.nbytes for part in parts}


class DiskMachine(StoreMachine):
    def make(self, budget: int | None) -> DiskStore:
        return DiskStore(self.folder, max_bytes=budget)

    def measure(self) -> dict[str, int]:
        with tempfile.TemporaryDirectory() as folder, DiskStore(folder) as store:
            for document in self.documents:
                store.put(document)
            return {entry.key: entry.nbytes for entry in store.entries()}


# Steps, not examples, are what costs: a step on disk is a few files and transactions.
TestMemoryStoreIsADictWithABudget = MemoryMachine.TestCase
TestMemoryStoreIsADictWithABudget.settings = settings(stateful_step_count=30)
TestDiskStoreIsADictWithABudget = DiskMachine.TestCase
TestDiskStoreIsADictWithABudget.settings = settings(stateful_step_count=20)
