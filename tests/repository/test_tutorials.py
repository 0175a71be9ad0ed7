"""The tutorials' code runs on the demo's model, and prints what their pages show."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from run_tutorials import FOLDER, alike, outputs, run_page

from ifkv.demo import model as demo_model

PAGES = [page for page in sorted(FOLDER.glob("*.md")) if outputs(page.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module", autouse=True)
def one_model() -> Iterator[None]:
    """Load the model once for all pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_model, "load_demo_model", cache(demo_model.load_demo_model))
        yield


@pytest.mark.e2e
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_prints_what_it_shows(page: Path) -> None:
    shown = page.read_text(encoding="utf-8")
    printed = run_page(shown, demo_model.prepare_demo_model())
    for number, (old, new) in enumerate(zip(outputs(shown), outputs(printed), strict=True), 1):
        assert alike(old, new), (
            f"output {number} of {page.name} has changed; run python tools/run_tutorials.py and "
            f"read the difference.\n--- shown\n{old}\n--- printed\n{new}"
        )
        assert new.strip(), f"output {number} of {page.name} is empty"


def test_seven_tutorials_are_run() -> None:
    assert len(PAGES) == 7


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("in 0.51 s, 3.1× of 80%", "in 1,022 ms, 12× of 7%", True),
        ("The lamp is red.", "The lamp is green.", False),
        ("KL 0.0270", "KL 0.0268", True),
        ("KL 0.027", "KL 0.127", False),
        ("7 crowns", "8 crowns", False),
        ("a  b\n", "a b", True),
        ("0.5 and", "and 0.5", False),
        ("", "x", False),
    ],
)
def test_what_counts_as_the_same_output(one: str, other: str, same: bool) -> None:
    assert alike(one, other) is same
    assert alike(other, one) is same


def test_a_page_runs_from_top_to_bottom_in_a_folder_of_its_own(tmp_path: Path) -> None:
    before = Path.cwd()
    page = (
        '```text title="sub/a.txt"\nhello\n```\n\n'
        '```python\nprint(open("sub/a.txt").read())\nx = 1\n```\n\n'
        '```text title="Output"\nold\n```\n\n```py\nraise SystemExit\n```\n\n'
        '```python\nprint(x + 1)\n```\n\n```text title="Output"\n```'
    )
    assert outputs(run_page(page, tmp_path)) == ["hello\n", "2\n"]
    assert Path.cwd() == before
    assert not (before / "sub").exists()


@pytest.mark.parametrize(
    "block", ["```python\n1 / 0\n```", "```sh\nrm x\n```", "```sh\nifkv ask\n```"]
)
def test_a_block_that_fails_is_an_error(block: str, tmp_path: Path) -> None:
    with pytest.raises((ZeroDivisionError, ValueError, RuntimeError)):
        run_page(block, tmp_path)
