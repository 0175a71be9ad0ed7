"""Streaming of text while it is generated."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def text_streamer(tokenizer: Any, stream: bool | Callable[[str], None]) -> Any:
    """Return a streamer for ``model.generate()``.

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
    """Stopping criterion for ``model.generate()`` that ends an answer whose stream was closed."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._wake: list[Callable[[], object]] = []

    @property
    def closed(self) -> bool:
        """True if the stream was closed."""
        return self._event.is_set()

    def on_close(self, wake: Callable[[], object]) -> None:
        """Register a function to be called when the stream is closed, to wake waiting threads."""
        self._wake.append(wake)

    def close(self) -> None:
        """Close the stream, so that the answer ends with its next token."""
        self._event.set()
        for wake in self._wake:
            wake()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return whether each sequence shall end here, bool ``[sequences]``."""
        import torch

        return input_ids.new_full((len(input_ids),), self.closed, dtype=torch.bool)


def pieces_of(run: Callable[..., object]) -> Iterator[str]:
    """Yield the pieces that a run emits; the run goes on in a thread as pieces are taken.

    Closing the iterator asks the run to stop, and waits until it has.

    Args:
        run: Called as ``run(emit, stopping)`` once the first piece is asked for: a function that
            takes each piece, and a stopping criterion for ``model.generate()``.

    Yields:
        The pieces.

    Raises:
        BaseException: The error of the run.
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
            with torch.inference_mode(inference):  # the mode is per thread
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
            with contextlib.suppress(queue.Empty):  # drop a piece that it still puts
                pieces.get(timeout=0.01)
        worker.join()
        if failures:
            raise failures[0]
