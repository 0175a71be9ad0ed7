"""``ifkv ask`` over an encoded store: all of it, a named part, what fits the question."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ifkv.cli import app
from ifkv.documents.source import Source
from ifkv.errors import InvalidInputError
from ifkv.store import DiskStore
from ifkv.testing import random_document, tiny_model, tiny_tokenizer

FERRY = "# The ferry\n\nThe ferry leaves at two.\n\nIt takes an hour to the pier."


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    model = tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=2048)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def options(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Options that name a store with three files' documents."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "notes").mkdir()
    (folder / "notes" / "ferry.md").write_text(FERRY)
    (folder / "notes" / "lamp.md").write_text("The lamp is red.")
    lines = [{"text": "The door is green."}, {"text": "The lamp is red."}]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, lines)))
    store = ["--model", model_folder, "--store", folder / "store"]
    files = [folder / "notes" / "ferry.md", folder / "notes" / "lamp.md", folder / "more.jsonl"]
    made = run("encode", *files, *store, "--split", 45)
    assert "5 documents: 4 encoded" in made
    return [*store, "--max-new-tokens", 2]


def test_ls_names_where_documents_are_from(options: list[Any]) -> None:
    shown = run("store", "ls", "--store", options[3])
    assert re.search(r"ferry\.md:5 \(2 of 2\) \S+/notes/ferry\.md", shown)
    assert re.search(r" lamp\.md \S+/notes/lamp\.md and 1 more", shown), "a text of two files"
    assert re.search(r" more\.jsonl:1 \S+/more\.jsonl", shown)


def test_ls_lets_no_control_character_out(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        key = store.put(random_document(1, length=4))
        store.add_sources([(key, Source("a\x1b[2J\nb"))])
    assert "a\ufffd[2J\ufffdb" in run("store", "ls", "--store", tmp_path)


def test_a_name_that_is_not_utf8_is_kept_and_shown(options: list[Any], tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.md")
    (tmp_path / name).write_text("The ferry leaves at two.")
    store = [*options[:2], "--store", tmp_path / "store"]
    run("encode", tmp_path / name, *store)
    assert "caf\ufffd.md" in run("store", "ls", "--store", tmp_path / "store")
    page = tmp_path / "page.html"
    shown = run("ask", "W?", *store, "--only", "caf*", "--max-new-tokens", 2, "--html", page)
    assert "caf\ufffd.md" in shown
    assert "caf\ufffd.md" in page.read_text(encoding="utf-8")


def test_a_question_over_all_of_a_store(options: list[object]) -> None:
    shown = run("ask", "Which?", *options, "--no-compare")
    assert "4 documents, " in shown
    assert "more.jsonl:1, ferry.md:1 (1 of 2), ferry.md:5 (2 of 2), lamp.md" in shown
    compared = run("ask", "Which?", *options)
    assert "full prefill" in compared
    assert "· ferry.md:5 (2 of 2)" in compared


def test_a_question_over_a_named_part(options: list[object]) -> None:
    shown = run("ask", "Which?", *options, "--no-compare", "--only", "*/notes/l*")
    assert "1 document, " in shown
    assert ": lamp.md" in shown
    shown = run("ask", "W?", *options, "--no-compare", "--only", "lamp.md", "--only", "more*")
    assert "2 documents, " in shown


def test_a_question_over_what_fits_it(options: list[object], tmp_path: Path) -> None:
    question = "Is the door green, or the lamp?"
    shown = run("ask", question, *options, "--no-compare", "--retrieve", 2)
    assert "2 documents, " in shown
    assert "lamp.md, more.jsonl:1" in shown, "the best is not the last"
    shown = run("ask", question, *options, "--no-compare", "--retrieve", 2, "--only", "*notes*")
    assert "2 documents, " in shown
    assert "ferry.md:1 (1 of 2), lamp.md" in shown
    # Among files, too, that would be too long together.
    (tmp_path / "a.md").write_text("".join(f"The boat {n} is old. " for n in range(150)))
    (tmp_path / "b.md").write_text("The door is green.")
    files = [tmp_path / "a.md", tmp_path / "b.md"]
    page = tmp_path / "page.html"
    own = [*options, "--store", "memory", "--split", 60, "--retrieve", 1, "--html", page]
    shown = run("ask", question, *files, *own)
    assert "1 document, " in shown
    assert ": b.md" in shown
    assert "b.md" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "x*"], r"no document's title or path matches 'x\*'; there are "),
        (["--retrieve", "2"], "none of the 4 documents has a word of the question"),
        (["--split", "30"], "--split 30 cuts files, and none was given"),
        (["--store", "memory"], "--store memory holds nothing yet"),
        (["--store", "nowhere"], "no store in nowhere; give files, name a store"),
        (["a.md", "--only", "x"], r"--only x names documents of a store, and files were given"),
        (["--dtype", "float64"], "none is a document that this model encoded"),
    ],
)
def test_what_cannot_be_asked_over_is_refused_in_words(
    options: list[object],
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.md").write_text("The lamp is red.")
    with pytest.raises(InvalidInputError, match=words):
        run("ask", "Who?", *options, *arguments)
    assert not Path("nowhere").exists(), "a mistyped store was made"


def test_too_much_of_a_store_is_refused_with_the_way_out(
    options: list[object], tmp_path: Path
) -> None:
    (tmp_path / "a.md").write_text("".join(f"The boat {n} is old. " for n in range(150)))
    store = [*options[:2], "--store", tmp_path / "store"]
    run("encode", tmp_path / "a.md", *store, "--split", 60)
    with pytest.raises(InvalidInputError, match=r"Ask over fewer: .*--only, or .*--retrieve N"):
        run("ask", "Who?", *store)


def test_retrieving_without_its_package_is_refused_before_the_weights_are_read(
    options: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    with pytest.raises(InvalidInputError, match="pip install bm25s"):
        run("ask", "Which lamp?", *options, "--retrieve", 2)
