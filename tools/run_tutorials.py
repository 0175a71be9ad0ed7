"""Run the tutorials' code and write its output into their pages: `python tools/run_tutorials.py`.

A tutorial is Markdown. From top to bottom:

- a ``python`` block is run, all blocks of a page in one namespace;
- a ``sh`` block holds ``ifkv ...`` commands, one a line, and is run too; ``$MODEL`` in it is the
  folder of the demo's model;
- a block titled with a file's name is written to that file, in a folder made for the page;
- a block titled ``Output`` is filled with what the blocks since the previous output printed.

Blocks of other languages (``console``, ``py``) are only shown. The names of single pages may be
given as arguments.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "tutorials"
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
# Parts that differ between runs: durations, and numbers computed from them.
_TIMES = re.compile(r"\d[\d,.]*\s*(?:ms|s|seconds?)\b|[\d.]+\s?×")
_SHARES = re.compile(r"\d[\d.]*\s?%")
_NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")
_FRAME = re.compile(r"[─│╭╮╰╯]+")


def run_page(text: str, model: Path) -> str:
    """Run a page.

    Args:
        text: Markdown of the page.
        model: Folder of the demo's model.

    Returns:
        The page with the output of this run.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = io.StringIO()

    def block(match: re.Match[str]) -> str:
        language, title, body = match.groups()
        if title == "Output":
            shown = _tidy(printed.getvalue(), model)
            printed.seek(0)
            printed.truncate()
            return f'```{language} title="Output"\n{shown}```'
        if title:
            Path(title).parent.mkdir(parents=True, exist_ok=True)
            Path(title).write_text(body, encoding="utf-8")
        elif language == "python":
            with contextlib.redirect_stdout(printed):
                exec(compile(body, "<tutorial>", "exec"), names)
        elif language == "sh":
            for line in body.splitlines():
                printed.write(_command(line, model))
        return match[0]

    with _own_folder():
        return _BLOCK.sub(block, text)


def outputs(text: str) -> list[str]:
    """Return the outputs that a page shows."""
    return [body for _, title, body in _BLOCK.findall(text) if title == "Output"]


def alike(one: str, other: str) -> bool:
    """Return True if two outputs agree: all but times, and numbers within two per cent."""
    words = [_FRAME.sub(" ", _SHARES.sub("%", _TIMES.sub("#", text))) for text in (one, other)]
    numbers = [[float(number) for number in _NUMBER.findall(text)] for text in words]
    if len(numbers[0]) != len(numbers[1]):
        return False
    near = all(abs(a - b) <= 2e-3 + 0.02 * abs(b) for a, b in zip(*numbers, strict=True))
    return near and len({" ".join(_NUMBER.sub("#", text).split()) for text in words}) == 1


def _command(line: str, model: Path) -> str:
    """Run one line of a shell block in this process; return what it prints."""
    from typer.testing import CliRunner

    from ifkv.cli import app

    words = []
    for word in shlex.split(line.replace("$MODEL", str(model))):
        words += sorted(glob(word)) or [word] if "*" in word else [word]
    if words[0] != "ifkv":
        raise ValueError(f"a sh block of a tutorial runs ifkv and nothing else; this is {line!r}.")
    result = CliRunner().invoke(app, words[1:], env={"COLUMNS": "90", "NO_COLOR": "1"})
    if result.exit_code:
        raise RuntimeError(f"{line}: exit status {result.exit_code}") from result.exception
    return result.stdout


@contextlib.contextmanager
def _own_folder() -> Iterator[None]:
    """Work in a temporary folder with its own store, so that the user's cache changes nothing."""
    before, store = Path.cwd(), os.environ.get("IFKV_STORE")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["IFKV_STORE"] = str(Path(folder, "default-store"))
        try:
            yield
        finally:
            os.chdir(before)
            del os.environ["IFKV_STORE"]
            if store is not None:
                os.environ["IFKV_STORE"] = store


def _tidy(text: str, model: Path) -> str:
    """Return text without this machine's folders and without blanks at the ends of lines."""
    here = Path.cwd()
    for folder, name in ((str(here), "."), (str(here.resolve()), "."), (str(model), "$MODEL")):
        text = text.replace(folder, name)
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"


def main(pages: list[str]) -> None:
    """Refresh the outputs of the given pages, or of all."""
    import torch

    from ifkv.demo.model import prepare_demo_model

    torch.set_num_threads(1)
    for page in [Path(name) for name in pages] or sorted(FOLDER.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        page.write_text(run_page(text, prepare_demo_model()), encoding="utf-8")
        print(page.name)


if __name__ == "__main__":
    main(sys.argv[1:])
