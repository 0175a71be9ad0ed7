"""Read the text files that command lines name; refuse unreadable ones with the reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ifkv.documents.source import Source
from ifkv.errors import InvalidInputError

FILES_HELP = (
    "Text or Markdown files, one document each, and .jsonl files, one document per line. "
    "--split cuts long ones into several documents."
)
Field = Annotated[str, typer.Option(help="Field of a JSONL line that holds the text.")]

_LINES = (".jsonl", ".ndjson")
# First bytes of formats that are often taken for text.
_BINARY = {b"%PDF": "a PDF", b"PK\x03\x04": "a ZIP archive or an office document"}
_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def read_texts(files: Sequence[Path]) -> list[str]:
    """Return one document per text file.

    Raises:
        InvalidInputError: Files are missing, blank, or not UTF-8 text; the message names them all.
    """
    texts, bad = [], []
    for file in files:
        try:
            texts.append(_read(file))
        except InvalidInputError as error:
            bad.append(str(error))
    if len(bad) > 1:
        raise InvalidInputError("\n  ".join([f"{len(bad)} of the files cannot be used:", *bad]))
    if bad:
        raise InvalidInputError(bad[0])
    return texts


def _read(file: Path) -> str:
    """Return a file's text.

    Raises:
        InvalidInputError: The file is missing, blank, or not UTF-8 text.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InvalidInputError(f"{file}: there is no such file; check its path.") from error
    except IsADirectoryError as error:
        raise InvalidInputError(
            f"{file} is a folder; give the files in it, for example {file}/*.md."
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(_not_utf8(file, error)) from error
    except OSError as error:
        raise InvalidInputError(
            f"{file} cannot be read: {error.strerror}; give a file that can."
        ) from error
    if "\0" in text:
        raise InvalidInputError(_not_text(file))
    text = text.removeprefix("\ufeff")  # a byte order mark is not part of the text
    if not text.strip():
        raise InvalidInputError(f"{file} is blank; leave it out or give it some text.")
    return text


def _not_utf8(file: Path, error: UnicodeDecodeError) -> str:
    """Return a sentence about a file whose bytes are not UTF-8."""
    data = error.object
    for start, name in _BINARY.items():
        if data.startswith(start):
            return f"{file} is {name}, not text; take the text out of it first."
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return f"{file} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {file} > NEW_FILE."
    if b"\0" in data:
        return _not_text(file)
    return (
        f"{file} is not UTF-8 at byte {error.start} (0x{data[error.start]:02x}); convert it from "
        f"what it is, for example: iconv -f LATIN1 -t UTF-8 {file} > NEW_FILE."
    )


def _not_text(file: Path) -> str:
    return f"{file} is not text (it holds zero bytes); give plain text or Markdown files."


def read_corpus(files: Sequence[Path], field: str) -> list[tuple[Source, str]]:
    """Return the documents of files: one per text or Markdown file, one per line of a JSONL file.

    Args:
        files: The files.
        field: Field of a JSONL line that holds the text.

    Returns:
        The source of each document, and its text.

    Raises:
        InvalidInputError: Files cannot be read, or a document has no text.
    """
    found = []
    for file, content in zip(files, read_texts(files), strict=True):
        if file.suffix.lower() not in _LINES:
            found.append((Source(file.name, str(file)), content))
            continue
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                text = _field_of(line, field, f"{file}, line {number}")
                found.append((Source(file.name, str(file), line=number), text))
    return found


def _field_of(line: str, field: str, where: str) -> str:
    """Return the text of a JSONL line.

    Raises:
        InvalidInputError: The line has no text.
    """
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInputError(
            f"{where} is not JSON: {error.msg} at column {error.colno}; give one JSON object a "
            "line, or name the file .txt if it is one text."
        ) from error
    except RecursionError as error:
        raise InvalidInputError(f"{where} is nested too deeply; give flat objects.") from error
    if not isinstance(entry, dict):
        raise InvalidInputError(
            f"{where} is {_kind(entry)}; give an object with the text in a field, such as "
            f'{{"{field}": "..."}}.'
        )
    if field not in entry:
        fields = ", ".join(map(repr, entry)) or "none"
        raise InvalidInputError(
            f"{where} has no field {field!r} (its fields: {fields}); name the right one with "
            "--field."
        )
    text = entry[field]
    if not isinstance(text, str):
        raise InvalidInputError(
            f"{where}: the field {field!r} is {_kind(text)}; it needs to be text. Another field "
            "can be named with --field."
        )
    if not text.strip():
        raise InvalidInputError(f"{where}: the field {field!r} is blank; it needs some text.")
    return text


def _kind(value: object) -> str:
    """Return the kind of a value in the words of JSON."""
    return _KINDS.get(type(value), "a text")
