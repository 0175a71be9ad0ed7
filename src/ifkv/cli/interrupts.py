"""Ctrl-C: one line about what has been saved so far, and exit code 130."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import typer

from ifkv.cli.wording import count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.documents.surrogate import SurrogateContext
    from ifkv.store import DocumentStore

EXIT_CODE = 130  # as shells count it: 128, and the number of the signal


class Kept:
    """Message printed on Ctrl-C: what has been saved so far."""

    def __init__(self) -> None:
        self.sentence: Callable[[], str] = lambda: "Nothing had been computed yet."


@contextlib.contextmanager
def interruptible() -> Iterator[Kept]:
    """Turn Ctrl-C in the block into a line about what has been saved.

    Yields:
        The message, whose sentence the block sets as its work advances.

    Raises:
        typer.Exit: The block was interrupted.
    """
    kept = Kept()
    try:
        yield kept
    except KeyboardInterrupt:
        # The line begins anew: the terminal shows ^C, perhaps after half an answer.
        typer.echo(f"\nInterrupted. {kept.sentence()}", err=True)
        raise typer.Exit(EXIT_CODE) from None


def documents_kept(
    store: DocumentStore,
    model: PreTrainedModel,
    documents: Sequence[list[int]],
    prefix: Sequence[int],
    surrogate: SurrogateContext | None = None,
) -> Callable[[], str]:
    """Return a function that says how many documents a store holds.

    Args:
        store: A store that outlives the process.
        model: A patched model; it need not be patched when the function is called.
        documents: Token ids of each.
        prefix: Prefix that they are encoded after.
        surrogate: Surrogate context that they are encoded behind, or None.
    """
    keys = {store.key_for(model, ids, prefix, surrogate) for ids in documents}

    def sentence() -> str:
        found = sum(key in store for key in keys)
        return (
            f"The store has {found} of {count(len(keys), 'document')}; the same command goes on "
            "from there."
        )

    return sentence
