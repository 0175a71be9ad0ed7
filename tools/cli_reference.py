"""Write docs/cli.md from the commands' own help: `python tools/cli_reference.py`."""

from __future__ import annotations

from pathlib import Path

import click
import typer
from typer.cli import get_docs_for_click

from ifkv.cli import app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
INTRODUCTION = """\
Made from the command line itself by `tools/cli_reference.py`; a test compares the two. \
`ifkv COMMAND --help` says the same.

Exit codes: 0, all is done; 1, it could not be done, or not all of it (a property that does not \
hold, a question without an answer); 2, what was given is wrong, and nothing has been computed; \
130, interrupted by Ctrl-C, where the same command goes on from what is kept. Errors and warnings \
go to standard error."""


def reference() -> str:
    """Return the page, with every command, argument and option."""
    command = typer.main.get_command(app)
    made = get_docs_for_click(
        obj=command, ctx=click.Context(command), name="ifkv", title="Command line"
    )
    title, _, rest = made.partition("\n\n")
    # No blanks at the ends of lines, and one newline at the end of the page.
    lines = "\n".join(line.rstrip() for line in f"{title}\n\n{INTRODUCTION}\n\n{rest}".splitlines())
    return lines.rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"docs/{PAGE.name}")
