"""Ctrl-C: one line that says what is kept, and exit code 130."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import typer

from ifkv.cli.wording import count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.store import DocumentStore

EXIT_CODE = 130  # as shells count it: 128, and the number of the signal


class Kept:
    """What an interruption finds done, in a sentence; set anew as the work goes on."""

    def __init__(self) -> None:
        self.sentence: Callable[[], str] = lambda: "Nothing had been computed yet."


@contextlib.contextmanager
def interruptible() -> Iterator[Kept]:
    """Turn Ctrl-C in the block into a line that says what is kept.

    Yields:
        Where the sentence about it is set.

    Raises:
        typer.Exit: It was interrupted.
    """
    kept = Kept()
    try:
        yield kept
    except KeyboardInterrupt:
        # On a line of its own: the terminal shows ^C, perhaps behind half an answer.
        typer.echo(f"\nInterrupted. {kept.sentence()}", err=True)
        raise typer.Exit(EXIT_CODE) from None


def documents_kept(
    store: DocumentStore,
    model: PreTrainedModel,
    documents: Sequence[list[int]],
    prefix: Sequence[int],
) -> Callable[[], str]:
    """A function that says how many documents a store has.

    Args:
        store: The store, which lasts longer than the process.
        model: A patched model; it need not be when the function is called.
        documents: Token ids of each.
        prefix: What they are encoded behind.
    """
    keys = {store.key_for(model, ids, prefix) for ids in documents}

    def sentence() -> str:
        found = sum(key in store for key in keys)
        return (
            f"The store has {found} of {count(len(keys), 'document')}; the same command goes on "
            "from there."
        )

    return sentence
