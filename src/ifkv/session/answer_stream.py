"""An answer as it comes: for `for` and for `async for`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

from ifkv.errors import InvalidInputError
from ifkv.generation.async_pieces import async_pieces
from ifkv.generation.streaming import Closing, pieces_of
from ifkv.utils.copying import Uncopied

if TYPE_CHECKING:
    from ifkv.session.answer import Answer


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
        """Fix the kind of loop that reads the stream.

        Raises:
            InvalidInputError: It is read in the other way.
        """
        if self._kind not in ("", kind):
            raise InvalidInputError(
                f"this stream is read by {self._kind}, not by {kind}; {instead}."
            )
        if self._kind == "":
            self._kind = kind
            if kind == "for":
                self._pieces = pieces_of(self._work)
            else:
                self._pieces = async_pieces(self._work, self._stopping)

    @property
    def answer(self) -> Answer | None:
        """Return the answer as far as it came; None before the stream has ended or was closed."""
        return self._found[0] if self._found else None
