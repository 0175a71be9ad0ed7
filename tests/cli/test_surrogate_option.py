"""``--surrogate`` of ``ifkv encode`` and ``ifkv ask``: one meaning, one store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ifkv
from ifkv.cli import app
from ifkv.cli.surrogate_option import surrogate_texts
from ifkv.errors import InvalidInputError
from ifkv.store import DiskStore
from ifkv.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    model = tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = []
    for name, text in (
        ("lamp.md", "The lamp is red."),
        ("door.md", "The door is green."),
        ("notes.txt", "Some notes of a traveller."),
        ("more.txt", "What the weather was like."),
        ("again.txt", "Some notes of a traveller."),
        ("blank.txt", " \n"),
        ("long.txt", "long " * 100),
    ):
        made.append(tmp_path / name)
        made[-1].write_text(text)
    return made


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_documents_are_found_behind_the_same_texts_only(
    model_folder: Path, files: list[Path], tmp_path: Path
) -> None:
    lamp, door, notes, more, *_ = files
    place = ["--model", model_folder, "--store", tmp_path / "store"]
    behind = ["--surrogate", notes, "--surrogate", more]
    asking = [*place, "--no-compare", "--max-new-tokens", 1]
    assert "2 documents: 2 encoded" in run("encode", lamp, door, *place, *behind)
    turned = ["--surrogate", more, "--surrogate", notes]
    assert "0 encoded, 2 already there" in run("encode", lamp, door, *place, *turned)
    assert "1 encoded, 0 already there" in run("encode", lamp, *place)
    run("ask", "Which?", *asking, *turned)
    run("ask", "Which?", door, *asking, *behind)  # it is there: nothing is made
    with DiskStore(tmp_path / "store") as store:
        entries = store.entries()
    made = [entry.surrogate for entry in entries if entry.prefix_key]
    assert len(made) == 3
    (identity,) = set(made) - {None}
    listed = run("store", "ls", "--store", tmp_path / "store")
    assert listed.count(str(identity)[:8]) == 2
    assert re.search(
        "documents 3 prefixes 1 surrogates 1", run("store", "stats", "--store", tmp_path / "store")
    )
    assert "4 entries checked, 0 set aside" in run("store", "verify", "--store", tmp_path / "store")
    with pytest.raises(InvalidInputError, match="none behind the SurrogateContext"):
        run("ask", "Which?", *asking, "--surrogate", notes)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["missing.txt"], r"missing\.txt: there is no such file"),
        (["blank.txt"], r"blank\.txt is blank"),
        (["notes.txt", "again.txt"], r"again\.txt has the same text as .*notes\.txt"),
        (["long.txt"], "--surrogate has 502 tokens and leaves documents no position"),
    ],
)
@pytest.mark.parametrize("command", [["encode"], ["ask", "Which?"]])
def test_bad_files_are_refused_before_the_weights_are_read(
    model_folder: Path,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    names: list[str],
    reason: str,
) -> None:
    monkeypatch.setattr("ifkv.cli.load_model.load_model", None)
    options = [part for name in names for part in ("--surrogate", tmp_path / name)]
    with pytest.raises(InvalidInputError, match=reason):
        run(*command, files[0], "--model", model_folder, "--store", tmp_path / "store", *options)


def test_a_document_too_long_behind_it_is_named(
    model_folder: Path, files: list[Path], tmp_path: Path
) -> None:
    notes = files[2]
    big = tmp_path / "big.md"
    big.write_text("x" * 420)
    place = ["--model", model_folder, "--store", tmp_path / "store"]
    run("encode", big, *place)
    with pytest.raises(InvalidInputError, match="and the surrogate context 28"):
        run("encode", big, *place, "--surrogate", notes)


def test_the_text_that_is_shipped_is_called_default(tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("A note.", encoding="utf-8")
    assert surrogate_texts(["default"]) == [ifkv.SURROGATE_TEXT]
    assert surrogate_texts([str(note), "default"]) == ["A note.", ifkv.SURROGATE_TEXT]
    with pytest.raises(InvalidInputError, match="same text"):
        surrogate_texts(["default", "default"])


def test_a_file_called_default_is_named_by_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("default").write_text("A file.", encoding="utf-8")
    assert surrogate_texts(["./default"]) == ["A file."]
