"""Times of a request's steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.loading import LayerLoader


class Stopwatch:
    """Times named steps; on a GPU it waits for them, so that a step's time is its own.

    While a step waits for a store to read, that time is ``load``'s and not the step's.

    Attributes:
        timings: Seconds of each step; a step that is run twice has the sum.
        seconds: Seconds from when it was made to the end of the last step.
        loaders: What reads the documents in the background, if anything does.

    Args:
        model: Whose device is waited for.
        since: Another; `seconds` are counted from when that one was made.
    """

    def __init__(self, model: PreTrainedModel, since: Stopwatch | None = None):
        self.timings: dict[str, float] = {}
        self.seconds = 0.0
        self.loaders: list[LayerLoader] = []
        self._device = model.device
        self._started: float = time.perf_counter() if since is None else since._started

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block as a step of this name."""
        start, waited = time.perf_counter(), self._waited
        try:
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        finally:
            end, waited = time.perf_counter(), self._waited - waited
            self.seconds = end - self._started
            self._add(name, end - start - waited)
            if waited:
                self._add("load", waited)

    def _add(self, name: str, seconds: float) -> None:
        self.timings[name] = self.timings.get(name, 0.0) + seconds

    @property
    def _waited(self) -> float:
        return sum(loader.wait_seconds for loader in self.loaders)
