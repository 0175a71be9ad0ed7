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
        loaders: What reads the documents in the background, if anything does.

    Args:
        model: Whose device is waited for.
        since: Count `seconds` from when this one was made.
    """

    def __init__(self, model: PreTrainedModel, since: Stopwatch | None = None):
        self.timings: dict[str, float] = {}
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
            waited = self._waited - waited
            self._add(name, time.perf_counter() - start - waited)
            if waited:
                self._add("load", waited)

    def _add(self, name: str, seconds: float) -> None:
        self.timings[name] = self.timings.get(name, 0.0) + seconds

    @property
    def _waited(self) -> float:
        return sum(loader.wait_seconds for loader in self.loaders)

    @property
    def seconds(self) -> float:
        """Return the seconds since it was made."""
        return time.perf_counter() - self._started
