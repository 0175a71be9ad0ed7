"""The house: packages stand on floors, and imports go down. Imports for types alone count, too."""

import ast
import graphlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "ifkv"
ROOT = {"__init__", "__main__", "errors", "version"}

# From the ground up. A package may import from lower floors and from itself; its files may not
# import one another in a circle. docs/structure.md says what each is for.
FLOORS = [
    {"errors", "version"},
    {"utils"},
    {"models"},
    {"backends", "cost", "demo"},
    {"forward"},
    {"patching"},
    {"documents"},
    {"cache", "store"},
    {"steps"},
    {"generation", "selectors"},
    {"planning", "report", "testing"},
    {"session"},
    {"evaluation"},
    {"cli"},
]
FLOOR = {package: number for number, floor in enumerate(FLOORS) for package in floor}
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}


def imports(path: Path) -> set[str]:
    """The files of ifkv that a file imports, anywhere in it, by their dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        inner = [name.removeprefix("ifkv.") for name in names if name.startswith("ifkv.")]
        found |= {name for name in inner if name in FILES}
    return found


GRAPH = {name: imports(path) - {name} for name, path in FILES.items() if name not in ROOT}


def test_every_package_has_a_floor_and_nothing_else_lies_at_the_root() -> None:
    assert {path.stem for path in SOURCE.glob("*.py")} <= ROOT
    assert {name.partition(".")[0] for name in GRAPH} <= set(FLOOR)
    assert len(FLOORS) <= 14


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_go_down(name: str) -> None:
    own = name.partition(".")[0]
    for other in GRAPH[name]:
        package = other.partition(".")[0]
        assert package == own or FLOOR[package] < FLOOR[own], f"{name} imports {other}"


def test_no_files_import_one_another_in_a_circle() -> None:
    # A package's __init__ hands names on; files of the package import one another by their paths.
    files = {
        name: {other for other in others if FILES[other].name != "__init__.py"}
        for name, others in GRAPH.items()
    }
    graphlib.TopologicalSorter(files).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("package", sorted(FLOOR.keys() - ROOT))
def test_a_package_says_what_belongs_in_it(package: str) -> None:
    said = ast.get_docstring(ast.parse((SOURCE / package / "__init__.py").read_text()))
    assert said is not None
    assert "Belongs here:" in said
    assert "Not here:" in said
