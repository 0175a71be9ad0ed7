"""``--import``: modules of the user, whose selectors can then be named."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ifkv.errors import InvalidInputError

Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        help="Python file or installed module to run first, so that the selectors it "
        "registers can be named. May be given several times.",
        show_default=False,
    ),
]


def import_all(names: Sequence[str]) -> None:
    """Import modules by name, and files that end in ``.py``, each once.

    Args:
        names: Names of modules, and paths of files.

    Raises:
        InvalidInputError: A module does not exist, or fails.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                _import_file(Path(name))
            else:
                importlib.import_module(name)
        except InvalidInputError:
            raise
        except Exception as error:  # what a user's module raises can be anything
            raise InvalidInputError(
                f"{name!r} cannot be imported ({type(error).__name__}: {error}); name a file that "
                "ends in .py, or a module that Python finds."
            ) from error


def _import_file(path: Path) -> None:
    """Import a file under a unique module name, by which its dataclasses are looked up."""
    path = path.resolve()
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
