"""The option for a surrogate context: text files that stand before documents when encoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ifkv.documents.surrogate_text import DEFAULT, SURROGATE_TEXT
from ifkv.errors import InvalidInputError

Surrogate = Annotated[
    list[str] | None,  # as it was written: a path drops the ./ of a file called default
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


def surrogate_texts(files: Sequence[str] | None) -> list[str] | None:
    """Return the texts of a surrogate context, or None if there is none.

    Args:
        files: What the option was given: paths, or ``"default"``.

    Raises:
        InvalidInputError: Files are missing, blank, not UTF-8 text, or have the same text.
    """
    from ifkv.cli.read_files import read_texts

    if not files:
        return None
    read = iter(read_texts([Path(file) for file in files if file != DEFAULT]))
    texts = [SURROGATE_TEXT if file == DEFAULT else next(read) for file in files]
    for number, text in enumerate(texts):
        if text in texts[:number]:
            raise InvalidInputError(
                f"--surrogate {files[number]} has the same text as {files[texts.index(text)]}; "
                "give each text once."
            )
    return texts
