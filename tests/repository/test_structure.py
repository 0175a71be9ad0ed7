"""The map of the code is true: its packages are there, and its walks name what is called."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import FrameType

import pytest
from figures.floors import FLOORS, GROUPS

import ifkv
from ifkv.store import DiskStore
from ifkv.testing import tiny_model, tiny_tokenizer

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


def test_the_walks_name_what_is_called(tmp_path: Path) -> None:
    source = ROOT / "src" / "ifkv"
    called: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(source):
            file = path.relative_to(source).with_suffix("").as_posix()
            called.add((file, frame.f_code.co_qualname))

    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    missing = []
    for title, hops in WALKS.items():
        session = ifkv.Session(model, tokenizer, store=DiskStore(tmp_path))
        sys.setprofile(note)
        try:
            session.add(["The lamp is red.", "The door is green.", "It rains."])
            if "question" in title:
                session.ask("Which colour is the door?", ratio=0.2, max_new_tokens=2)
        finally:
            sys.setprofile(None)
        own = {name.rpartition(".")[2] for file, name in called if file.startswith("backends/")}
        for file, name in hops:
            if file == "backends/base":  # abstract: a backend has its own
                found = name.rpartition(".")[2] in own
            elif name in ("Answer", "DocumentCache"):  # made by a method that dataclasses wrote
                found = True
            else:
                inner = f"{name}.<locals>."
                found = any(file == f and (n == name or n.startswith(inner)) for f, n in called)
            if not found:
                missing.append(f"{file}.py: {name}")
    assert not missing
