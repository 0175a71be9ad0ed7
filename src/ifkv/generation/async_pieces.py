"""Streaming into an event loop, which goes on with other work meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable

import torch

from ifkv.generation.streaming import Closing


async def async_pieces(run: Callable[..., object], stopping: Closing) -> AsyncIterator[str]:
    """Yield pieces as `pieces_of` does, for ``async for``.

    Closing the iterator asks the run to stop, and waits until it has, without blocking the loop.

    Args:
        run: Called as ``run(emit, stopping)`` in a thread once the first piece is asked for.
        stopping: The stopping criterion that ends it.

    Yields:
        The pieces.

    Raises:
        BaseException: The error of the run, unless the reading task was cancelled.
    """
    loop, inference = asyncio.get_running_loop(), torch.is_inference_mode_enabled()
    pieces: asyncio.Queue[str | None] = asyncio.Queue()
    taken = threading.Semaphore(1)  # no further ahead than one piece
    stopping.on_close(taken.release)
    failures: list[BaseException] = []

    def hand_over(piece: str | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    def emit(piece: str) -> None:
        taken.acquire()
        if not stopping.closed:
            hand_over(piece)

    def work() -> None:
        try:
            with torch.inference_mode(inference):  # the mode is per thread
                run(emit, stopping)
        except BaseException as failure:
            failures.append(failure)
        finally:
            hand_over(None)

    worker = threading.Thread(target=work, name="ifkv-stream", daemon=True)
    worker.start()
    ended = cancelled = False
    try:
        while (piece := await pieces.get()) is not None:
            taken.release()
            yield piece
        ended = True
    except asyncio.CancelledError:
        cancelled = True
        raise
    finally:
        stopping.close()
        while not ended:
            ended = await pieces.get() is None
        worker.join()  # it has nothing left to do
        if failures and not cancelled:
            raise failures[0]
