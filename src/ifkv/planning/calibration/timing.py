"""Time pieces of work in passes that lie apart, and take the fastest pass of each."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch

# Passes that differ by no more than this factor agree.
AGREEMENT = 1.15


@dataclasses.dataclass
class Probe:
    """Piece of work to be timed.

    Attributes:
        run: Function that does it once.
        passes: Seconds of each pass: the median of its runs, the faster of two.
    """

    run: Callable[[], object]
    passes: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Return the seconds of the fastest pass: other work on the machine only adds time.

        The fastest single run is not taken: it is faster than a request's work usually is.
        """
        return min(self.passes)

    @property
    def disagreement(self) -> float:
        """Return the second fastest pass over the fastest: 1 if another pass confirms it."""
        fastest, second = sorted(self.passes)[:2]
        return second / fastest


class Clock:
    """Clock for work on a device.

    Args:
        device: Device it runs on; on CUDA the clock waits for it.
    """

    def __init__(self, device: torch.device):
        self._device = device

    def time(self, run: Callable[[], object]) -> float:
        """Return the seconds of one run."""
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def run_in_turns(probes: Sequence[Probe], clock: Clock, *, seconds: float, most: int = 6) -> None:
    """Run one pass: all probes in turns, the short ones several times.

    Probes take turns, because a run that follows itself finds its data in the processor's caches,
    where a model's next layer would not.

    Args:
        probes: The probes, each of which has run before.
        clock: The clock.
        seconds: Intended time of the pass. Each probe has an equal share of it. It runs at least
            twice, and not again once its share is spent.
        most: Largest number of turns of a probe.
    """
    share = seconds / max(len(probes), 1)
    runs: list[list[float]] = [[] for _ in probes]
    for turn in range(most):
        for probe, times in zip(probes, runs, strict=True):
            # The fastest run decides: an interruption should not cost a probe its other turns.
            if turn < 2 or turn * min(times) <= share:
                times.append(clock.time(probe.run))
    for probe, times in zip(probes, runs, strict=True):
        probe.passes.append(statistics.median_low(times))


def run_in_passes(
    probes: Sequence[Probe],
    clock: Clock,
    *,
    pass_seconds: float,
    more_seconds: float,
) -> None:
    """Run two passes over all probes, and further ones over those on which they disagree.

    The passes lie apart, so that a burst of other work does not hit both passes of a probe. An idle
    machine needs two. On a busy one, each probe gets more chances to run undisturbed.

    Args:
        probes: The probes, each of which has run before.
        clock: The clock.
        pass_seconds: As in `run_in_turns`.
        more_seconds: Seconds after the second pass, past which no further pass begins.
    """
    for _ in range(2):
        run_in_turns(probes, clock, seconds=pass_seconds)
    start = time.perf_counter()
    while time.perf_counter() - start < more_seconds:
        disputed = [probe for probe in probes if probe.disagreement > AGREEMENT]
        if not disputed:
            return
        run_in_turns(disputed, clock, seconds=pass_seconds * len(disputed) / len(probes))


def grow(
    sizes: Sequence[int],
    make: Callable[[int], Sequence[Probe]],
    clock: Clock,
    *,
    limit: float,
    power: int,
    least: int = 2,
) -> dict[int, list[Probe]]:
    """Make probes of growing size, and stop before one would take longer than ``limit`` seconds.

    Every probe runs twice, which warms it up.

    Args:
        sizes: Sizes, ascending.
        make: Function that makes the probes of a size, in order.
        clock: The clock.
        limit: Longest time of one probe, in seconds.
        power: Largest power of the size with which time grows.
        least: Number of sizes that are kept in any case, even if the first look slow by chance.

    Returns:
        The probes of each size that was reached.
    """
    found: dict[int, list[Probe]] = {}
    slowest, before = 0.0, 0
    for size in sizes:
        if len(found) >= least and slowest * (size / before) ** power > limit:
            break
        found[size] = list(make(size))
        first, second = ([clock.time(probe.run) for probe in found[size]] for _ in range(2))
        # The faster of two runs counts: a burst of other work should leave no size out.
        slowest = max(map(min, first, second))
        before = size
    return found
