"""Progress bars for long work, on standard error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor


def track_tokens(groups: Sequence[Sequence[Tensor]], description: str) -> Iterator[list[Tensor]]:
    """Yield groups of documents behind a bar that counts their tokens.

    Args:
        groups: Token ids of the documents of each group.
        description: What is being done.
    """
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
    sizes = [sum(len(ids) for ids in group) for group in groups]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=sum(sizes))
        for group, size in zip(groups, sizes, strict=True):
            yield list(group)
            bar.advance(task, size)
