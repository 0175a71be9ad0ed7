"""Progress bar of a long evaluation, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def ways_bar(total: int) -> Iterator[Callable[[int, str], None]]:
    """Show a bar over all ways of all questions.

    Args:
        total: Number of ways, over all questions.

    Yields:
        A function that takes the number of ways just done, and a note on the current work.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=600) as bar:
        task = bar.add_task("", total=total)

        def advance(done: int, text: str) -> None:
            bar.update(task, advance=done, description=escape(text))

        yield advance
