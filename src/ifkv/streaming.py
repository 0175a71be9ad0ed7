"""Text as it is generated."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

from ifkv.copying import Uncopied
from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    import torch

    from ifkv.answer import Answer


def text_streamer(tokenizer: Any, stream: bool | Callable[[str], None]) -> Any:
    """A streamer for ``model.generate()``.

    Args:
        tokenizer: The tokenizer.
        stream: True to print, a function to be called with each piece of text, False for none.

    Returns:
        A transformers streamer that leaves the prompt and special tokens out, or None.
    """
    if stream is False:
        return None
    from transformers import TextStreamer

    if stream is True:
        return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    emit = stream

    class _Callback(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                emit(text)

    return _Callback(tokenizer, skip_prompt=True, skip_special_tokens=True)


class Closing:
    """A stopping criterion for ``model.generate()`` that ends an answer whose stream was closed."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._wake: list[Callable[[], object]] = []

    @property
    def closed(self) -> bool:
        """True if the stream was closed."""
        return self._event.is_set()

    def on_close(self, wake: Callable[[], object]) -> None:
        """Call a function when the stream is closed, to wake what waits for its reader."""
        self._wake.append(wake)

    def close(self) -> None:
        """End the answer with its next token."""
        self._event.set()
        for wake in self._wake:
            wake()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Tell whether each sequence shall end here, bool ``[sequences]``."""
        import torch

        return input_ids.new_full((len(input_ids),), self.closed, dtype=torch.bool)


def pieces_of(run: Callable[..., object]) -> Iterator[str]:
    """What a run emits, piece by piece; the run goes on in a thread as pieces are taken.

    To close the iterator asks the run to stop, and waits until it has.

    Args:
        run: Called as ``run(emit, stopping)`` once the first piece is asked for: a function that
            takes each piece, and a stopping criterion for ``model.generate()``.

    Yields:
        The pieces.

    Raises:
        BaseException: What the run raised.
    """
    import torch

    pieces: queue.Queue[str | None] = queue.Queue(maxsize=1)  # no further ahead than one piece
    stopping, inference = Closing(), torch.is_inference_mode_enabled()
    failures: list[BaseException] = []

    def emit(piece: str) -> None:
        if not stopping.closed:
            pieces.put(piece)

    def work() -> None:
        try:
            with torch.inference_mode(inference):  # a thread starts without its maker's
                run(emit, stopping)
        except BaseException as failure:
            failures.append(failure)
        finally:
            if not stopping.closed:
                pieces.put(None)

    worker = threading.Thread(target=work, name="ifkv-stream", daemon=True)
    worker.start()
    try:
        while (piece := pieces.get()) is not None:
            yield piece
    finally:
        stopping.close()
        while worker.is_alive():
            with contextlib.suppress(queue.Empty):  # a piece that it is about to hand over
                pieces.get(timeout=0.01)
        worker.join()
        if failures:
            raise failures[0]


class AnswerStream(Uncopied, Iterator[str], AsyncIterator[str]):
    """An answer, piece by piece as it is generated; then the answer itself.

    For a ``for`` loop, or for ``async for``, whose event loop goes on with other work meanwhile:
    one of the two. Work begins with the first piece. To close the stream (``await aclose()`` in an
    event loop), or to drop it, stops the answer there.
    """

    _instead = "read it once, and take its answer"

    def __init__(self, run: Callable[..., Answer]):
        found: list[Answer] = []  # not self, which would only be dropped by the garbage collector

        def work(emit: Callable[[str], None], stopping: Closing) -> None:
            found.append(run(emit, stopping))

        self._found = found
        self._work = work
        self._stopping = Closing()  # of async for
        self._pieces: Any = None
        self._kind = ""

    def __next__(self) -> str:
        self._read_by("for")
        piece: str = next(self._pieces)
        return piece

    async def __anext__(self) -> str:
        self._read_by("async for")
        piece: str = await anext(self._pieces)
        return piece

    def close(self) -> None:
        """Stop the answer where it is, and wait until it has stopped."""
        self._read_by("for", "call await aclose()")
        self._pieces.close()

    async def aclose(self) -> None:
        """Stop the answer where it is, and wait until it has stopped; others go on meanwhile."""
        self._read_by("async for", "call close()")
        self._stopping.close()
        while self._pieces.ag_running:  # another task waits for a piece, which will not come
            await asyncio.sleep(0.01)
        await self._pieces.aclose()

    def _read_by(self, kind: str, instead: str = "make another stream") -> None:
        """Begin to read in one way.

        Raises:
            InvalidInputError: It is read in the other way.
        """
        if self._kind not in ("", kind):
            raise InvalidInputError(
                f"this stream is read by {self._kind}, not by {kind}; {instead}."
            )
        if self._kind == "":
            from ifkv.async_pieces import async_pieces

            self._kind = kind
            if kind == "for":
                self._pieces = pieces_of(self._work)
            else:
                self._pieces = async_pieces(self._work, self._stopping)

    @property
    def answer(self) -> Answer | None:
        """The answer, as far as it came; None until the stream is at its end, or closed."""
        return self._found[0] if self._found else None
