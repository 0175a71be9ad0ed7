"""Command line: ``ifkv demo | ask | eval | plan | verify | encode | store | families``.

Belongs here: one file per command, and what commands share: files, options, loading, output.
Not here: anything that a Python user needs too; that goes into the package of its concept.
"""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated, TextIO

import typer

from ifkv.cli.ask import ask
from ifkv.cli.demo import demo
from ifkv.cli.encode import encode
from ifkv.cli.eval import evaluate
from ifkv.cli.families import families
from ifkv.cli.plan import plan
from ifkv.cli.store import store_app
from ifkv.cli.verify import verify
from ifkv.errors import (
    CalibrationWarning,
    IfkvError,
    InvalidInputError,
    StoreWarning,
    UnloadedWeightsWarning,
    UnsupportedModelError,
    UpstreamWarning,
)

_OURS = (StoreWarning, CalibrationWarning, UnloadedWeightsWarning, UpstreamWarning)

app = typer.Typer(
    name="ifkv",
    no_args_is_help=True,
    help="Answer questions over documents whose keys and values were computed once. Start "
    "with: ifkv demo",
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    """Print the version and exit, before any command."""
    if wanted:
        from ifkv.version import __version__

        typer.echo(f"ifkv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Run before every command; it does nothing."""


app.command()(demo)
app.command()(ask)
app.command()(encode)
app.command("eval")(evaluate)
app.command()(plan)
app.command()(families)
app.command()(verify)
app.add_typer(store_app, name="store")


def main() -> None:
    """Run the command line; print our errors as one sentence, without a traceback.

    Exit with 2 if what was given is wrong, an argument or a model, and with 1 for other errors.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe that is not UTF-8 shows a question mark for what it cannot write.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.showwarning = _show_warning
    try:
        app()
    except IfkvError as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        sys.exit(2 if isinstance(error, InvalidInputError | UnsupportedModelError) else 1)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print our warnings as a sentence; other warnings keep their place in the code.

    The arguments are those of `warnings.showwarning`.
    """
    if issubclass(category, _OURS):
        typer.secho(f"Warning: {message}", fg="yellow", err=True)
    else:
        typer.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True)


__all__ = ["app", "main"]
