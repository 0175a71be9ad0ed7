"""Use the installed ifkv: `python -I smoke.py FAMILY...`, from a folder that is no checkout.

`ifkv.testing` is imported too, since users have it without the packages that our tests need.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

import ifkv
import ifkv.testing
from ifkv.models.families import families


def main(expected: list[str]) -> None:
    """Check where ifkv comes from, every family it knows, and its command."""
    home = Path(ifkv.__file__).resolve().parent
    site = Path(sysconfig.get_path("purelib")).resolve()
    if home.parent != site:
        sys.exit(f"ifkv was imported from {home}, not from the installed wheel in {site}")
    if not (home / "py.typed").is_file():
        sys.exit(f"{home} has no py.typed: type checkers would ignore the annotations")

    known = families()
    if sorted(known) != sorted(expected):
        sys.exit(f"families found: {sorted(known)}; in the checkout: {sorted(expected)}")
    for family in known.values():
        for path in (family.attention_class, family.layer_class, family.model_class):
            module, _, name = path.rpartition(".")
            getattr(importlib.import_module(module), name)

    command = Path(sysconfig.get_path("scripts"), "ifkv")
    shown = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
    if shown.returncode or "demo" not in shown.stdout:
        sys.exit(f"ifkv --help: status {shown.returncode}\n{shown.stdout}{shown.stderr}")
    version = importlib.metadata.version("ifkv")
    print(f"ifkv {version}: {len(known)} families ({', '.join(sorted(known))}), command works")


if __name__ == "__main__":
    main(sys.argv[1:])
