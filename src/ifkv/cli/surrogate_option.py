"""The option for a surrogate context: text files that stand before documents when encoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ifkv.documents.surrogate_text import DEFAULT, SURROGATE_TEXT
from ifkv.errors import InvalidInputError

Surrogate = Annotated[
    list[Path] | None,
    typer.Option(
        "--surrogate",
        help="Surrogate context: a text file that stands in for what will precede a document in a "
        "request, or default for the text that ifkv ships. Each document is encoded behind it, and "
        "only the document is kept. May be given "
        "several times, for the mean over several texts and as many prefills. It decides which "
        "documents are found in a store: encode and ask with the same files. Default: each "
        "document is encoded alone.",
        metavar="FILE",
        show_default=False,
    ),
]


def surrogate_texts(files: Sequence[Path] | None) -> list[str] | None:
    """Return the texts of a surrogate context, or None if there is none.

    Raises:
        InvalidInputError: Files are missing, blank, not UTF-8 text, or have the same text.
    """
    from ifkv.cli.read_files import read_texts

    if not files:
        return None
    shipped = [str(file) == DEFAULT for file in files]
    read = iter(read_texts([file for file, own in zip(files, shipped, strict=True) if not own]))
    texts = [SURROGATE_TEXT if own else next(read) for own in shipped]
    for number, text in enumerate(texts):
        if text in texts[:number]:
            raise InvalidInputError(
                f"--surrogate {files[number]} has the same text as {files[texts.index(text)]}; "
                "give each text once."
            )
    return texts
