"""``ifkv encode``: build a store for a corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ifkv.cli.loading import load_model, load_tokenizer, read_texts
from ifkv.cli.store import parse_bytes
from ifkv.errors import InvalidInputError


def read_corpus(files: Sequence[Path], field: str) -> Iterator[tuple[str, str]]:
    """Documents of files: one per text or Markdown file, one per line of a JSONL file.

    Args:
        files: The files.
        field: Where a JSONL line has its text.

    Yields:
        Where the document is from, and its text.

    Raises:
        InvalidInputError: A file cannot be read, or a document has no text.
    """
    for file in files:
        if file.suffix.lower() not in (".jsonl", ".ndjson"):
            yield str(file), read_texts([file])[0]
            continue
        for number, line in enumerate(read_texts([file])[0].splitlines(), 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InvalidInputError(
                    f"{file}, line {number} is no JSON object with {field!r} "
                    f"({type(error).__name__}); name the field with --field."
                ) from error
            if not isinstance(text, str) or not text.strip():
                raise InvalidInputError(
                    f"{file}, line {number}: {field!r} is {str(text)[:40]!r}; it needs some text."
                )
            yield f"{file}:{number}", text


def encode(
    files: Annotated[list[Path], typer.Argument(help="Text, Markdown or JSONL files.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A model's folder or hub id.")],
    store: Annotated[
        str | None,
        typer.Option(
            "--store", "-s", help="A folder or URL; the user's cache folder if not given."
        ),
    ] = None,
    field: Annotated[str, typer.Option(help="The field of a JSONL line that has the text.")] = (
        "text"
    ),
    dtype: Annotated[str, typer.Option(help="The model's dtype.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to run it.")] = "cpu",
    codec: Annotated[str, typer.Option(help="exact, fp8 or int8.")] = "exact",
    max_bytes: Annotated[
        str | None, typer.Option(help="Budget of the store, such as 20GiB.")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of one forward.")] = None,
) -> None:
    """Prefill a corpus into a store, skipping what is there; interrupted, it can be run again."""
    from ifkv.patching import patch
    from ifkv.progress import token_bar
    from ifkv.store import encode_documents, open_store
    from ifkv.text import PromptFormat

    texts = [text for _, text in read_corpus(files, field)]
    budget = None if max_bytes is None else parse_bytes(max_bytes)
    opened = open_store(store, max_bytes=budget, codec=codec)
    layout = PromptFormat(load_tokenizer(model))
    loaded = load_model(model, dtype=dtype, device=device)
    with patch(loaded), token_bar("encoding") as report:
        result = encode_documents(
            loaded,
            opened,
            [layout.document_ids(text) for text in texts],
            prefix=layout.prefix_ids(),
            batch_tokens=batch_tokens,
            on_progress=report,
        )
    typer.echo(
        f"{len(texts)} documents: {result.made} encoded, {result.present} already there, "
        f"{len(texts) - result.made - result.present} given twice"
    )
    evicted = sum(key not in opened for key in set(result.keys))
    if evicted:
        typer.echo(
            f"{evicted} of them have been evicted again: all together do not fit into the store's "
            "budget. Raise --max-bytes, or name a --store on a larger disk.",
            err=True,
        )
