"""Names in docstrings and pages become links on the site: no foreign markup, no dead reference."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "patches").glob("*.md")])
SOURCES = sorted((ROOT / "src").rglob("*.py"))

# A role of Sphinx, as in :func:`name`; Markdown shows its colons.
ROLE = re.compile(r":[a-z]+(?::[a-z]+)?:`")
# [name][] and [text][name], which mkdocstrings resolves.
REFERENCE = re.compile(r"\[([^\[\]]+)\]\[(ifkv[\w.]*|)\]")
DIRECTIVE = re.compile(r"^::: (\S+)((?:\n    .*)*)", re.MULTILINE)


def docstrings(path: Path) -> list[str]:
    """Return the docstrings of a file: of its module, classes, functions and attributes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]


def documented() -> set[str]:
    """Return every name that has an anchor on a page of the reference."""
    found = set()
    for page in DOCS.rglob("*.md"):
        for name, options in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            found.add(name)
            if "members: false" not in options:
                found |= members(name)
    return found


def members(name: str) -> set[str]:
    """Return the public names below a module or class that its page shows, with docstrings."""
    thing = resolve(name)
    if isinstance(thing, ModuleType):
        own = getattr(thing, "__all__", None) or [
            key
            for key, value in vars(thing).items()
            if getattr(value, "__module__", None) == thing.__name__
        ]
        below = {f"{name}.{key}" for key in own if not key.startswith("_")}
        return below.union(*(members(key) for key in below if inspect.isclass(resolve(key))))
    if inspect.isclass(thing):
        return {
            f"{name}.{key}"
            for key, value in vars(thing).items()
            if not key.startswith("_") and (callable(value) or isinstance(value, property))
        }
    return set()


def resolve(name: str) -> object:
    """Return the module, or the attribute of one, that a dotted name is."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        owner, _, attribute = name.rpartition(".")
        return getattr(resolve(owner), attribute)


@pytest.mark.parametrize(
    "path", [*SOURCES, *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_no_role_reaches_the_site(path: Path) -> None:
    found = ROLE.search(path.read_text(encoding="utf-8"))
    assert found is None, f"write [ifkv.name][] or `name` instead of {found and found.group()}"


def test_references_in_docstrings_lead_to_names_of_the_reference() -> None:
    names = documented()
    assert "ifkv.Session.ask" in names
    dead = {
        f"{path.relative_to(ROOT)}: [{target or text}]"
        for path in SOURCES
        for docstring in docstrings(path)
        for text, target in REFERENCE.findall(docstring)
        if (target or text).strip("`") not in names
    }
    assert not dead, "add '::: name' to a page under docs/reference, or name it without a link"


def test_references_on_pages_lead_to_names_of_the_reference() -> None:
    names = documented()
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for text, target in REFERENCE.findall(prose):
            assert (target or text).strip("`") in names, f"{page.name}: [{target or text}]"


def test_a_returns_section_is_not_taken_for_a_type() -> None:
    """The site's parser takes what stands before a colon on the section's first line for one."""
    for name in documented():
        section = re.search(
            r"^(?:Returns|Yields):\n(.*)", inspect.getdoc(resolve(name)) or "", re.M
        )
        assert section is None or not re.search(r":(?= |$)", section[1]), f"{name}: {section[1]}"
