"""The documentation is complete and up to date: names, command line, figures, links."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from xml.etree import ElementTree

import arena_tables
import pytest
from cli_reference import PAGE, reference
from draw_figures import FOLDER, figures
from speed_tables import BLOCK, TABLES, filled
from speed_tables import PAGES as PAGES_WITH_SPEEDS

import ifkv
from ifkv import selectors

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "patches" / "README.md"]
    if page.is_file()
)


def directives() -> set[str]:
    """What the reference's pages ask mkdocstrings for."""
    pages = DOCS.rglob("*.md")
    return {
        name
        for page in pages
        for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }


@pytest.mark.parametrize("name", ifkv.__all__)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    assert f"ifkv.{name}" in directives(), f"add '::: ifkv.{name}' to a page in docs/reference"


def rooms() -> list[str]:
    """Modules and packages that state their public names."""
    found = [info.name for info in pkgutil.walk_packages(ifkv.__path__, "ifkv.")]
    return [
        name
        for name in ["ifkv", *found]
        if "flashinfer" not in name
        and not name.endswith("_triton")
        and hasattr(importlib.import_module(name), "__all__")
    ]


@pytest.mark.parametrize("room", rooms())
def test_every_public_name_is_documented(room: str) -> None:
    module = importlib.import_module(room)
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            assert inspect.getdoc(thing), f"{room}.{name} has no docstring"
        if inspect.isclass(thing):
            for method, member in vars(thing).items():
                if not method.startswith("_") and (
                    inspect.isfunction(member) or isinstance(member, property)
                ):
                    assert inspect.getdoc(getattr(thing, method)), f"{room}.{name}.{method}"


def test_the_reference_asks_for_nothing_that_is_not_there() -> None:
    for name in directives():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


def test_every_selector_has_a_row() -> None:
    page = (DOCS / "selectors.md").read_text(encoding="utf-8")
    ours = [
        n for n in selectors.names() if selectors.selector_class(n).__module__.startswith("ifkv.")
    ]
    assert [name for name in ours if f"\n| `{name}` | " not in page] == []


def test_the_command_lines_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run python tools/cli_reference.py"


def test_figures_are_up_to_date() -> None:
    drawn = figures()
    assert {path.name for path in FOLDER.iterdir()} == set(drawn), "run tools/draw_figures.py"
    for name, content in drawn.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == content, name


@pytest.mark.parametrize("page", PAGES_WITH_SPEEDS)
def test_tables_of_speed_are_up_to_date(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert filled(text) == text, "run python tools/speed_tables.py"
    assert BLOCK.search(text), f"{page} has no table of speeds between markers"


def test_the_arenas_tables_are_up_to_date() -> None:
    text = arena_tables.PAGE.read_text(encoding="utf-8")
    assert arena_tables.filled(text) == text, "run python tools/arena_tables.py"
    assert {found[2] for found in arena_tables.BLOCK.finditer(text)} == set(arena_tables.TABLES)


def test_every_table_of_speed_is_shown_somewhere() -> None:
    shown = {
        found[2]
        for page in PAGES_WITH_SPEEDS
        for found in BLOCK.finditer((ROOT / page).read_text(encoding="utf-8"))
    }
    assert shown == set(TABLES)


@pytest.mark.parametrize("name", sorted(figures()))
def test_a_figure_is_sound_and_can_be_read_by_all(name: str) -> None:
    root = ElementTree.fromstring(figures()[name])
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    title = root.find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert title.text
    assert "prefers-color-scheme: dark" in figures()[name]
    for shape in root.iter("{http://www.w3.org/2000/svg}rect"):
        x, y = float(shape.get("x", 0)), float(shape.get("y", 0))
        assert 0 <= x <= x + float(shape.get("width", 0)) <= width
        assert 0 <= y <= y + float(shape.get("height", 0)) <= height
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        # A generous width of a letter: text may not run out of the picture.
        length = len(text.text or "") * float(text.get("font-size", 0)) * 0.5
        start = {"start": 0.0, "middle": -length / 2, "end": -length}[text.get("text-anchor", "")]
        assert float(text.get("x", 0)) + start >= 0, text.text
        assert float(text.get("x", 0)) + start + length <= width, text.text
        assert 0 < float(text.get("y", 0)) < height, text.text


def anchors(page: Path) -> set[str]:
    """Anchors that a page's headings get."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    slugs = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
        slugs.add(re.sub(r"[\s]+", "-", words))
    return slugs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


def test_a_version_is_the_same_everywhere() -> None:
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert project is not None
    assert citation is not None
    assert project[1] == citation[1] == ifkv.__version__
    assert f"## {ifkv.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_are_included_and_not_their_names(page: Path) -> None:
    """A formatter that takes an include for Python puts spaces into it, and it is shown as is."""
    for line in page.read_text(encoding="utf-8").splitlines():
        if re.match(r"\s*-+ *8 *<", line):
            assert re.fullmatch(r'--8<-- "[^"]+"', line), f"{page.name} would show {line!r}"


def test_the_list_of_properties_names_the_files_that_hold_them() -> None:
    text = (DOCS / "method.md").read_text(encoding="utf-8")
    rows = {
        int(number): set(re.findall(r"`(\w+\.py)`", files))
        for number, files in re.findall(r"^\| (\d+) \|.* \| (.+) \|$", text, re.MULTILINE)
    }
    assert list(rows) == list(range(1, 29))
    laws = ROOT / "tests" / "laws"
    for file in set(re.findall(r"`(test_\w+\.py)`", text)):
        assert (laws / file).exists(), file
    for number, files in rows.items():
        tests = rf"^def test_laws?_(?:\d+_and_)?{number}_"
        holders = {
            path.name
            for path in laws.glob("test_*.py")
            if re.search(tests, path.read_text(encoding="utf-8"), re.MULTILINE)
        }
        assert not holders or holders & files, f"property {number} is held in {holders}"
