"""Disk stores under kill -9 and under many processes.

Workers are forked, since importing torch anew would take longer than the tests.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ifkv.errors import DocumentNotFoundError, StoreFullError
from ifkv.store import DiskStore, StoredDocument, key_of
from ifkv.testing import assert_bit_equal, random_document

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")

PREFIXES = [random_document(1000 + i, length=2) for i in range(3)]
DOCUMENTS = [random_document(i, length=3 + i, prefix=PREFIXES[i % 3]) for i in range(12)]
BY_KEY = {key_of(document): document for document in [*PREFIXES, *DOCUMENTS]}


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child; it exits with 0 unless it raises."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(path: Path) -> int:
    """Whatever the store shows is whole; index and files agree; how many entries there are."""
    with DiskStore(path, verify="always") as store:
        shown = list(store.keys())
        for key in shown:
            found, wanted = store.get(key), BY_KEY[key]
            for name in ("token_ids", "prefix_ids", "keys", "values"):
                assert_bit_equal(getattr(found, name), getattr(wanted, name), what=name)
        assert store.stats().corrupt == 0
        assert store.folder.quarantine_files() == []
        assert list(store.folder.temporary.iterdir()) == []
        files = [key for key, _ in store.folder.files()]
        assert sorted(shown) == sorted(key for key in files if key)
        assert None not in files
        return len(shown)


def test_a_writer_killed_at_random(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    rounds = 1000 if pytestconfig.getoption("--profile") == "long" else 50
    source = random.Random(0)
    counts = []

    def work(puts: float = float("inf")) -> None:
        with DiskStore(tmp_path, max_bytes=12_000) as store:
            while puts > 0:
                store.put(source.choice(DOCUMENTS))
                puts -= 1

    # On a busy machine a writer needs longer to get anywhere before it is killed.
    started = time.monotonic()
    assert exit_code(fork(lambda: work(4))) == 0
    longest = max(0.04, time.monotonic() - started)
    for number in range(rounds):
        source.seed(number)
        child = fork(work)
        time.sleep(source.uniform(0.001, longest))
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL
        counts.append(check(tmp_path))
    assert max(counts) > 3


STEPS = ("open", "write", "fsync", "replace", "unlink", "stat", "close")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_a_writer_killed_at_each_step(tmp_path: Path, step: str, before: bool) -> None:
    """SIGKILL just before, and just after, every call that touches the disk."""
    with DiskStore(tmp_path) as store:
        store.put(DOCUMENTS[0])
        size = sum(entry.nbytes for entry in store.entries())

    def dies_at(number: int) -> Callable[[], None]:
        def work() -> None:
            calls = 0
            real = getattr(os, step)

            def deadly(*args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls == number + 1 and before:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = real(*args, **kwargs)
                if calls == number + 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            # Room for two: the put evicts, too.
            with DiskStore(tmp_path, max_bytes=2 * size) as store:
                setattr(os, step, deadly)
                for document in DOCUMENTS[3:7]:
                    store.put(document)
                    store.get(key_of(document))

        return work

    number, survived = 0, False
    while not survived:
        survived = exit_code(fork(dies_at(number))) == 0
        check(tmp_path)
        number += 3  # a sample; every call would be a few hundred rounds
    assert number >= 3  # it was killed at least once


def test_eight_processes_hammer_one_folder(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    seconds = 30.0 if pytestconfig.getoption("--profile") == "long" else 2.5

    def hammer(number: int) -> None:
        source = random.Random(number)
        budget = [None, 9_000, 16_000][number % 3]
        deadline = time.monotonic() + seconds
        served = 0
        with DiskStore(tmp_path, max_bytes=budget, verify="always") as store:
            held = []
            # On a busy machine a process may need longer to find a document that is there.
            while time.monotonic() < deadline + (0 if served else 60):
                document = source.choice(DOCUMENTS)
                key, kind = key_of(document), source.random()
                with contextlib.suppress(DocumentNotFoundError, StoreFullError):
                    if kind < 0.45:
                        assert store.put(document) == key
                    elif kind < 0.9:
                        found = store.get(key, lazy=source.random() < 0.5)
                        if isinstance(found, StoredDocument) and source.random() < 0.5:
                            held.append((found, document))  # read later, evicted or not
                        else:
                            assert_bit_equal(found.values, document.values, what="values")
                        served += 1
                    elif kind < 0.95:
                        store.delete(source.choice([key, key_of(source.choice(PREFIXES))]))
                    elif kind < 0.98:
                        store.pin(key, source.random() < 0.3)
                    else:
                        store.close()
                        store = DiskStore(tmp_path, max_bytes=budget, verify="always")
                while len(held) > 5:
                    found, document = held.pop(0)
                    assert_bit_equal(found.keys, document.keys, what="keys")
            assert store.stats().corrupt == 0
        assert served > 0

    children = [fork(lambda number=number: hammer(number)) for number in range(8)]
    assert [exit_code(child) for child in children] == [0] * 8
    assert check(tmp_path) > 0


def test_all_put_the_same_document_at_once(tmp_path: Path) -> None:
    barrier = multiprocessing.get_context("fork").Barrier(6)

    def work() -> None:
        with DiskStore(tmp_path) as store:
            barrier.wait()
            for document in DOCUMENTS[:4]:
                key = store.put(document)
                assert key in store
                store.get(key)

    children = [fork(work) for _ in range(6)]
    assert [exit_code(child) for child in children] == [0] * 6
    assert check(tmp_path) == 4 + 3


def test_two_budgets_on_one_folder(tmp_path: Path) -> None:
    """Each process keeps to its own budget when it puts."""
    with DiskStore(tmp_path) as large, DiskStore(tmp_path, max_bytes=6_000) as small:
        for document in DOCUMENTS:
            large.put(document)
        assert large.stats().nbytes > 12_000
        small.put(random_document(50))
        assert small.stats().nbytes <= 6_000
        assert large.stats().nbytes == small.stats().nbytes


def test_a_store_survives_a_fork(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        store.put(DOCUMENTS[0])

        def work() -> None:
            assert key_of(DOCUMENTS[0]) in store
            store.put(DOCUMENTS[1])

        assert exit_code(fork(work)) == 0
        assert key_of(DOCUMENTS[1]) in store
        store.put(DOCUMENTS[2])
    assert check(tmp_path) == 6


def test_a_live_writer_is_not_cleaned_up_under(tmp_path: Path) -> None:
    from ifkv.store.codecs import CODECS
    from ifkv.store.document_file import DocumentFile

    with DiskStore(tmp_path) as store:
        file = DocumentFile(DOCUMENTS[0], CODECS["exact"])
        with store.folder.written(file) as temporary:
            assert exit_code(fork(lambda: DiskStore(tmp_path).close())) == 0
            assert temporary.exists()
        assert not temporary.exists()
        leftover = store.folder.temporary / "0123.tmp"
        leftover.write_bytes(b"of a process that died")
    DiskStore(tmp_path).close()
    assert not leftover.exists()
