"""Progress bars for long work, on standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor


@contextlib.contextmanager
def token_bar(
    description: str, *, shown: bool = True
) -> Iterator[Callable[[int, int], None] | None]:
    """A bar that counts tokens while the block runs.

    Args:
        description: What is being done.
        shown: Whether to show it at all.

    Yields:
        A function to be called with tokens done and tokens to do; None if it is not shown.
    """
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def track_tokens(groups: Sequence[Sequence[Tensor]], description: str) -> Iterator[list[Tensor]]:
    """Yield groups of documents behind a bar that counts their tokens.

    Args:
        groups: Token ids of the documents of each group.
        description: What is being done.
    """
    sizes = [sum(len(ids) for ids in group) for group in groups]
    done = 0
    with token_bar(description) as report:
        assert report is not None
        for group, size in zip(groups, sizes, strict=True):
            report(done, sum(sizes))
            yield list(group)
            done += size
        report(done, sum(sizes))
