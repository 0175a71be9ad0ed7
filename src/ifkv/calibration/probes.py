"""Run pieces of work in turns, and take of each the times that neighbours disturbed least."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch


@dataclasses.dataclass
class Probe:
    """A piece of work to be timed.

    Attributes:
        run: Does it once.
        times: Seconds of every run that counts.
    """

    run: Callable[[], object]
    times: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The lower quartile: noise only ever adds time."""
        ordered = sorted(self.times)
        return ordered[(len(ordered) - 1) // 4]


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


def run_in_turns(
    probes: Sequence[Probe], clock: Clock, *, budget: float, least: int = 3, most: int = 15
) -> None:
    """Time all probes once a round, so that a noisy moment hits all alike.

    Args:
        probes: The probes, each of which has run before.
        clock: The clock.
        budget: Seconds after which no further round begins.
        least: Rounds in any case.
        most: Rounds at most.
    """
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > budget:
            return
        for probe in probes:
            probe.times.append(clock.time(probe.run))


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
        for probe in found[size]:
            clock.time(probe.run)
        slowest = max(clock.time(probe.run) for probe in found[size])
        before = size
    return found
