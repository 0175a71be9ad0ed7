"""`--import`: a user's own selectors on the command line; and `--version`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import ifkv
from ifkv import selectors
from ifkv.cli import app
from ifkv.cli.import_option import import_all
from ifkv.errors import InvalidInputError
from ifkv.selectors import registry
from ifkv.testing import tiny_model, tiny_tokenizer

RULE = """
from __future__ import annotations

import dataclasses

from ifkv import selectors
from ifkv.cost import Cost


@selectors.register
@dataclasses.dataclass(frozen=True)
class Evens(selectors.Ranked):
    name = "evens"
    paper = "unpublished"

    step: int = 2

    def rank(self, model, cache, request):
        return (cache.positions % self.step == 0).double(), Cost()
"""


@pytest.fixture
def rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a selector; what it registers is forgotten after the test."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    (tmp_path / "evens.py").write_text(RULE)
    return tmp_path / "evens.py"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_model(dtype=torch.float32, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_file_s_selector_chooses(rule: Path, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The lamp is red.")
    (tmp_path / "b.txt").write_text("The door is green.")
    ask = ["ask", "Which?", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    ask += ["--model", str(model_folder), "--store", "memory", "--max-new-tokens", "2"]
    page = tmp_path / "page.html"
    ask += ["--import", str(rule), "--selector", "evens:step=3", "--html", str(page)]
    result = CliRunner().invoke(app, ask)
    assert result.exit_code == 0, result.output
    assert "evens:step=3" in page.read_text(encoding="utf-8")


def test_a_file_is_imported_once_and_a_module_by_name(
    rule: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_all([str(rule), str(rule)])
    made = selectors.selector_class("evens")
    import_all([str(rule)])
    assert selectors.selector_class("evens") is made
    (tmp_path / "odd_rules_of_a_user.py").write_text(RULE.replace("evens", "odds"))
    monkeypatch.syspath_prepend(str(tmp_path))
    import_all(["odd_rules_of_a_user"])
    assert "odds" in selectors.names()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gone.py", None, "FileNotFoundError"),
        ("no.such.module", None, "ModuleNotFoundError"),
        ("", None, "ValueError"),
        ("bad.py", "1 / 0", "ZeroDivisionError"),
        ("bad.py", "def", "SyntaxError"),
        ("taken.py", RULE.replace('"evens"', '"epic"'), "taken by Epic"),
    ],
)
def test_what_cannot_be_imported_is_refused_before_the_model(
    rule: Path, tmp_path: Path, name: str, text: str | None, words: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    place = str(tmp_path / name) if name.endswith(".py") else name
    ask = ["ask", "Which?", str(rule), "--model", "no/such/model", "--import", place]
    for _ in range(2):  # a file that failed is not taken for imported
        result = CliRunner().invoke(app, ask)
        assert isinstance(result.exception, InvalidInputError)
        assert words in str(result.exception)


def test_eval_knows_imported_selectors(rule: Path, tmp_path: Path) -> None:
    given = ["eval", "--model", "no/such/model", "--data", "needle", "--limit", "1"]
    given += ["--out", str(tmp_path / "out"), "--selectors", "evens"]
    without = CliRunner().invoke(app, given)
    assert "there is no selector 'evens'" in str(without.exception)
    # With it the next thing that is wrong is the model.
    found = CliRunner().invoke(app, [*given, "--import", str(rule)])
    assert "no/such/model" in str(found.exception)


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"ifkv {ifkv.__version__}\n"
