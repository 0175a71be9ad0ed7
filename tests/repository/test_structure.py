"""The map of the code is true: its packages are there, and its walks name what is called."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from figures.floors import FLOORS, GROUPS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
PACKAGES = {path.parent.name for path in (ROOT / "src" / "ifkv").glob("*/__init__.py")}
MOST_HOPS = 25
HOP = re.compile(r"^\| \d+ \| `([\w/]+)\.py` · `([\w.]+)` \|", re.MULTILINE)
WALKS = {
    title: HOP.findall(text)
    for title, text in re.findall(r"^## (The walk of \w+ \w+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}


def test_every_package_has_a_line() -> None:
    listed = re.findall(r"^\| `(\w+)` \| .+ \| (`.+`) \|$", PAGE, re.MULTILINE)
    assert {name for name, _ in listed} == PACKAGES | {"errors"}
    for name, files in listed:
        for file in re.findall(r"`(\w+\.py)`", files):
            folder = ROOT / "src" / "ifkv" / ("" if name == "errors" else name)
            assert (folder / file).is_file(), f"{name}/{file}"


def test_the_picture_shows_every_package_once() -> None:
    drawn = [name for floor in FLOORS for name, _ in floor]
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == PACKAGES | {"errors"}
    assert sorted(name for names, _, _ in GROUPS for name in names) == sorted(drawn)


@pytest.mark.parametrize("walk", ["The walk of a document", "The walk of a question"])
def test_every_hop_of_a_walk_is_there(walk: str) -> None:
    hops = WALKS[walk]
    assert 5 < len(hops) <= MOST_HOPS
    for file, name in hops:
        thing = importlib.import_module("ifkv." + file.replace("/", "."))
        for part in name.split("."):
            assert hasattr(thing, part), f"{file}.py has no {name}"
            thing = getattr(thing, part)
