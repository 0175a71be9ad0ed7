"""Time pieces of work in passes that lie apart, and take of each its fastest pass."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch

# Passes that differ by no more than this have met the same machine.
AGREEMENT = 1.15


@dataclasses.dataclass
class Probe:
    """A piece of work to be timed.

    Attributes:
        run: Does it once.
        passes: Seconds of each pass: the median of its runs, the faster of two.
    """

    run: Callable[[], object]
    passes: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The fastest pass: a neighbour only ever adds time.

        Not the fastest run, which is sooner than a request's work is on an ordinary moment.
        """
        return min(self.passes)

    @property
    def disagreement(self) -> float:
        """The second fastest pass over the fastest: 1 where another pass confirms it."""
        fastest, second = sorted(self.passes)[:2]
        return second / fastest


class Clock:
    """Times work on a device.

    Args:
        device: Where it runs; on CUDA the clock waits for it.
    """

    def __init__(self, device: torch.device):
        self._device = device

    def time(self, run: Callable[[], object]) -> float:
        """Seconds of one run."""
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def run_in_turns(probes: Sequence[Probe], clock: Clock, *, seconds: float, most: int = 6) -> None:
    """One pass: all probes in turns, the short ones several times.

    In turns, since a run that follows itself finds its data in the processor's caches, where a
    model's next layer would not find its own.

    Args:
        probes: The probes, each of which has run before.
        clock: The clock.
        seconds: What the pass should take. Each probe has an equal share of it: it takes two turns
            in any case, and no further one once its share is spent.
        most: Turns of each at most.
    """
    share = seconds / max(len(probes), 1)
    runs: list[list[float]] = [[] for _ in probes]
    for turn in range(most):
        for probe, times in zip(probes, runs, strict=True):
            # By its fastest run: an interruption should not cost a probe its other turns.
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
    """Two passes over all probes, and further ones over those that they disagree on.

    The passes lie apart, so that a burst of other work does not hit both of a probe's. A machine
    at rest needs two; on a busy one each probe has more chances to run undisturbed.

    Args:
        probes: The probes, each of which has run before.
        clock: The clock.
        pass_seconds: As in `run_in_turns`.
        more_seconds: Seconds after the second pass when no further one begins.
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
        sizes: Ascending.
        make: The probes of a size, in order.
        clock: The clock.
        limit: Seconds of one probe.
        power: Time grows with this power of the size at most.
        least: So many sizes are kept in any case, whatever a noisy moment makes of the first.

    Returns:
        For each size that was reached its probes.
    """
    found: dict[int, list[Probe]] = {}
    slowest, before = 0.0, 0
    for size in sizes:
        if len(found) >= least and slowest * (size / before) ** power > limit:
            break
        found[size] = list(make(size))
        first, second = ([clock.time(probe.run) for probe in found[size]] for _ in range(2))
        # The faster of the two: a burst of other work should leave no size out.
        slowest = max(map(min, first, second))
        before = size
    return found
