"""Progress bars for long work, on standard error or in a notebook's output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor


@contextlib.contextmanager
def token_bar(
    description: str, *, shown: bool = True
) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar that counts tokens while the block runs.

    Args:
        description: Text beside the bar.
        shown: Show the bar.

    Yields:
        A function that takes the tokens done and the total; None if the bar is not shown.
    """
    if not shown:
        yield None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_jupyter:
        with _notebook_bar(description) as report_there:
            yield report_there
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),  # with the elapsed time: a long document takes minutes without a step
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console)
    task = bar.add_task(description, total=None)
    with contextlib.ExitStack() as until_the_end:

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            # Not shown earlier: a refusal before any work must leave no bar behind.
            if not bar.live.is_started:
                until_the_end.enter_context(bar)

        yield report


@contextlib.contextmanager
def _notebook_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar as a widget, or as text without ipywidgets; rich shows nothing there.

    Args:
        description: Text beside the bar.

    Yields:
        A function that takes the tokens done and the total.
    """
    from tqdm.auto import tqdm

    with contextlib.ExitStack() as until_the_end:
        bars: list[Any] = []

        def report(done: int, total: int) -> None:
            # Not made earlier: a refusal before any work must leave no bar behind.
            if not bars:
                bars.append(tqdm(desc=description, total=total, unit=" tokens"))
                until_the_end.callback(bars[0].close)
            bars[0].update(done - bars[0].n)

        yield report


@contextlib.contextmanager
def without_loading_bars() -> Iterator[None]:
    """Hide transformers' bars for loading weights while the block runs; ifkv shows its own.

    Bars of downloads stay visible.
    """
    from huggingface_hub import utils
    from transformers.utils import logging

    downloads: Any = utils
    if not logging.is_progress_bar_enabled():
        yield
        return
    downloads_hidden = downloads.are_progress_bars_disabled()
    logging.disable_progress_bar()  # hides those of downloads too
    if not downloads_hidden:
        downloads.enable_progress_bars()
    try:
        yield
    finally:
        logging.enable_progress_bar()
        if downloads_hidden:
            downloads.disable_progress_bars()


def track_tokens(groups: Sequence[Sequence[Tensor]], description: str) -> Iterator[list[Tensor]]:
    """Yield groups of documents and show a bar that counts their tokens.

    Args:
        groups: Token ids of the documents of each group.
        description: Text beside the bar.
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
