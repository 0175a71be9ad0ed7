"""Peak memory of a function, in a separate process (Linux only)."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Seconds between samples. A layer of a short request takes several times as long.
INTERVAL = 0.002
TIMEOUT = 1800


def resident() -> int:
    """Return the resident bytes of this process; 0 where there is no /proc."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def peak_above(run: Callable[[], Any]) -> int:
    """Return the largest resident size of this process during a run, less the size before.

    Memory that the allocator kept from earlier work is first returned to the system (with glibc).
    Otherwise the run could reuse it, and it would not be counted.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    before, seen, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
        seen.append(resident())
    finally:
        done.set()
        watcher.join()
    return max(0, max(seen) - before)


def in_own_process(measure: Callable[..., Any], *given: Any) -> Any:
    """Call a module-level function in a fresh process and return its result.

    Raises:
        RuntimeError: The process ended without an answer; its own error is on the screen.
    """
    spawn = multiprocessing.get_context("spawn")
    reader, writer = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_answer, args=(writer, measure, given))
    process.start()
    writer.close()
    try:
        if not reader.poll(TIMEOUT):
            process.kill()
            raise RuntimeError(f"{measure.__name__} took over {TIMEOUT} s.")
        return reader.recv()
    except EOFError:
        raise RuntimeError(f"{measure.__name__} failed in its process; see above.") from None
    finally:
        process.join()


def _answer(writer: Any, measure: Callable[..., Any], given: tuple[Any, ...]) -> None:
    writer.send(measure(*given))
    writer.close()
