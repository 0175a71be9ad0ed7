"""``ifkv store``: inspect a store of documents and keep it in order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ifkv.errors import InvalidInputError, StoreCorruptionError

if TYPE_CHECKING:
    from ifkv.documents.source import Source
    from ifkv.store import DiskStore
    from ifkv.store.inventory import Inventory

store_app = typer.Typer(
    name="store",
    help="Look into a store of prefilled documents and keep it in order. Example: ifkv store "
    "ls --store documents",
    no_args_is_help=True,
)

Folder = Annotated[
    Path | None,
    typer.Option("--store", "-s", help="Folder of the store. Default: the user's cache folder."),
]
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Return a number of bytes from text such as ``500M``, ``2GiB`` or ``1000``.

    Raises:
        InvalidInputError: The text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", text.strip().lower())
    if match is None:
        raise InvalidInputError(f"{text!r} is no size; write 500M, 2GiB or a number of bytes.")
    return int(float(match[1]) * _UNITS[match[2]])


def _existing(folder: Path | None) -> Path:
    """Return the folder of an existing store; a mistyped path must not make an empty one."""
    from ifkv.store.default_path import default_store_path

    path = default_store_path() if folder is None else folder
    if scheme := re.match(r"\w[\w+.-]+(?=:/)", str(path)):
        raise InvalidInputError(
            f"--store is a URL ({scheme[0]}://), but these commands work on folders; give the "
            "folder of a store on disk."
        )
    if not (path / "documents").is_dir():
        raise InvalidInputError(
            f"there is no store in {path}; name one with --store, or make one with ifkv encode."
        )
    return path


def _open(folder: Path | None) -> DiskStore:
    path = _existing(folder)
    from ifkv.store import DiskStore

    return DiskStore(path)


def _look(folder: Path | None) -> Inventory:
    """Return what can be read without torch, whose import takes seconds."""
    from ifkv.store.inventory import Inventory

    return Inventory(_existing(folder))


def _size(nbytes: int) -> str:
    from rich.filesize import decimal

    return decimal(nbytes)


def _named(sources: Sequence[Source]) -> str:
    """Return a document's sources in one line, without control characters."""
    if not sources:
        return ""
    location = sources[0].location
    name = f"{sources[0]}  {location}" if location not in ("", str(sources[0])) else str(sources[0])
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    return "".join(char if char.isprintable() else "\ufffd" for char in name) + more


def _entries(number: int) -> str:
    return "1 entry" if number == 1 else f"{number} entries"


@store_app.command("ls")
def list_entries(folder: Folder = None) -> None:
    """List the entries, the most recently used first."""
    with _look(folder) as store:
        sources = store.sources()
        typer.echo(
            "key               tokens  size      codec  prefix            surrogate  model     "
            "pinned  source"
        )
        for entry in reversed(store.entries()):
            typer.echo(
                f"{entry.key[:16]}  {entry.tokens:>6}  {_size(entry.nbytes):<8}  "
                f"{entry.codec:<5}  {(entry.prefix_key or '-')[:16]:<16}  "
                f"{(entry.surrogate or '-')[:8]:<9}  {entry.fingerprint[:8]}  "
                f"{'yes' if entry.pinned else '':<6}  {_named(sources.get(entry.key, []))}".rstrip()
            )


@store_app.command()
def stats(folder: Folder = None) -> None:
    """Print the number of documents, tokens and bytes."""
    with _look(folder) as store:
        entries = store.entries()
        prefixes = {entry.prefix_key for entry in entries if entry.prefix_key}
        for name, value in (
            ("folder", str(store.path)),
            ("documents", str(len(entries) - len(prefixes))),
            ("prefixes", str(len(prefixes))),
            ("surrogates", str(len({entry.surrogate for entry in entries if entry.surrogate}))),
            ("models", str(len({entry.fingerprint for entry in entries}))),
            ("tokens", str(sum(entry.tokens for entry in entries))),
            ("size", _size(sum(entry.nbytes for entry in entries))),
            ("pinned", str(sum(entry.pinned for entry in entries))),
            ("quarantined", str(store.quarantined())),
        ):
            typer.echo(f"{name:<12} {value}")


@store_app.command()
def prune(
    folder: Folder = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(
            help="Evict the least recently used entries until the store "
            "is no larger than this, such as 2GiB."
        ),
    ] = None,
) -> None:
    """Evict entries down to a size, and remove leftover and quarantined files."""
    budget = None if max_bytes is None else parse_bytes(max_bytes)
    with _open(folder) as store:
        evicted = store.prune(budget)
        left = _size(store.stats().nbytes)
        typer.echo(f"evicted {_entries(evicted)}; {left} remain")


@store_app.command()
def verify(folder: Folder = None) -> None:
    """Check every byte of every entry; exit with 1 if any is damaged."""
    with _open(folder) as store:
        checked = len(store)
        found = store.verify()
        aside = [error for error in found if isinstance(error, StoreCorruptionError)]
        for error in found:
            what = "corrupt" if error in aside else "not readable"
            typer.echo(f"{what}: {error.key}: {error.reason}", err=True)
        typer.echo(f"{_entries(checked)} checked, {len(aside)} set aside")
    if found:
        raise typer.Exit(1)


@store_app.command()
def rm(
    keys: Annotated[
        list[str],
        typer.Argument(help="Keys of entries, or their first digits, as ifkv store ls shows them."),
    ],
    folder: Folder = None,
) -> None:
    """Remove entries; with a prefix, also the documents encoded after it."""
    with _open(folder) as store:
        for start in keys:
            matching = [key for key in list(store.keys()) if key.startswith(start)]
            if len(matching) != 1 or not start:
                raise InvalidInputError(
                    f"{start!r} begins {len(matching)} keys of this store; give enough digits to "
                    "mean one. ifkv store ls lists them."
                )
            store.delete(matching[0])
            typer.echo(f"removed {matching[0]}")
