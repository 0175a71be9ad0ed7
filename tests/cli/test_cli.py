"""The command line, on a tiny model saved to a folder."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import ifkv.session.prepare
import ifkv.steps.rows_pass
from ifkv.cli import app
from ifkv.cost import ModelShape
from ifkv.errors import InvalidInputError
from ifkv.planning import Planner
from ifkv.selectors import DEFAULT_SELECTOR
from ifkv.session.ratio import Ratios
from ifkv.store import DiskStore
from ifkv.testing import tiny_model, tiny_tokenizer
from rates import ROWS_COST

TEXTS = {"lamp.txt": "The lamp is red.", "door.md": "The door is green and old.", "r.txt": "Rain."}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    model = tiny_model(
        "llama",
        dtype=torch.float32,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=2048,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    return [str(tmp_path / name) for name in TEXTS]


def test_verify_passes_on_a_sound_model(model_folder: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(model_folder), "--length", "16"])
    assert result.exit_code == 0, result.output
    assert "All properties hold" in result.output
    assert "BROKEN" not in result.output


def test_verify_fails_when_a_law_is_broken(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows are not written into the cache: all attend to stale keys and values.
    def forgetful(self, keys, values, layer_idx, **unread):
        return keys, values

    monkeypatch.setattr(ifkv.steps.rows_pass.RowsPass, "update", forgetful)
    result = CliRunner().invoke(app, ["verify", str(model_folder), "--length", "16"])
    assert result.exit_code == 1
    assert "BROKEN" in result.output


def test_ask_compares_three_ways_and_draws(
    model_folder: Path, texts: list[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    arguments = ["ask", "Which colour?", *texts, "--model", str(model_folder)]
    options = ["--ratio", "0.3", "--max-new-tokens", "3", "--html", str(page)]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    for expected in ("full prefill", "stitch only", "ifkv, r = 0.3", "lamp.txt"):
        assert expected in result.output
    assert "Which colour?" in page.read_text()


@pytest.mark.parametrize("order", [[2, 0, 1], [0, 1, 2]])
def test_ask_says_that_the_kl_of_reordered_documents_cannot_be_compared(
    model_folder: Path,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    order: list[int],
) -> None:
    monkeypatch.setattr("ifkv.session.prepare.order_by_hits", lambda *_: order)
    arguments = ["ask", "Which colour?", *texts, "--model", str(model_folder), "--reorder"]
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "2", "--html", str(page)])
    assert result.exit_code == 0, result.output
    for shown in (" ".join(result.output.split()), page.read_text()):
        assert ("its distance cannot be compared" in shown) == (order != [0, 1, 2])


def test_ask_prefills_a_file_once(model_folder: Path, texts: list[str], tmp_path: Path) -> None:
    arguments = ["ask", "Which colour?", *texts, "--model", str(model_folder)]
    arguments += ["--max-new-tokens", "2"]

    def said(*options: str) -> str:
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    assert "3 prefilled once in" in said("--store", "memory")
    assert "3 prefilled once in" in said()
    assert "3 found in the store in" in said()
    (tmp_path / "r.txt").write_text("Rain and wind.")
    assert "1 prefilled once, 2 found in the store in" in said()
    assert "3 prefilled once in" in said("--store", str(tmp_path / "other"))
    assert (tmp_path / "other" / "index.sqlite3").exists()


def test_ask_and_encode_read_files_alike(
    model_folder: Path, texts: list[str], tmp_path: Path
) -> None:
    lines = ['{"body": "The lamp is red."}', "", '{"body": "Rain."}']
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    options = [str(tmp_path / "lines.jsonl"), "--field", "body", "--model", str(model_folder)]
    options += ["--store", str(tmp_path / "kept")]
    made = CliRunner().invoke(app, ["encode", *texts, *options])
    assert "5 documents: 3 encoded, 0 already there, 2 given twice" in made.output
    asked = CliRunner().invoke(app, ["ask", "Which?", *options, "--max-new-tokens", "2"])
    assert asked.exit_code == 0, asked.output
    assert "2 documents, " in asked.output
    assert "2 found in the store" in " ".join(asked.output.split())
    for title in ("lines.jsonl:1", "lines.jsonl:3"):
        assert title in asked.output


def test_a_corrupt_document_is_a_sentence_and_an_answer(
    model_folder: Path, texts: list[str], tmp_path: Path
) -> None:
    arguments = ["ask", "Which colour?", *texts, "--model", str(model_folder), "--no-compare"]
    arguments += ["--max-new-tokens", "3", "--store", str(tmp_path / "kept")]
    first = CliRunner().invoke(app, arguments)
    with DiskStore(tmp_path / "kept") as store:
        files = [store.folder.file_of(one.key) for one in store.entries() if one.prefix_key]
    for file in files:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    command = [sys.executable, "-c", "from ifkv.cli import main; main()", *arguments]
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert first.stdout.splitlines()[0] == second.stdout.splitlines()[0]
    warned = [line for line in second.stderr.splitlines() if "Warning" in line]
    assert len(warned) == 3
    assert all(line.startswith("Warning: document ") for line in warned)
    assert "Warning" not in first.stderr


def test_ask_streams_one_answer(model_folder: Path, texts: list[str]) -> None:
    arguments = ["ask", "Which colour?", *texts, "--model", str(model_folder), "--no-compare"]
    result = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "3"])
    assert result.exit_code == 0, result.output
    assert "first token after" in result.output
    assert "full prefill" not in result.output


def test_ask_in_8_bits(model_folder: Path, texts: list[str], monkeypatch) -> None:
    found = []
    stitch = ifkv.session.prepare.stitch_many
    monkeypatch.setattr(
        "ifkv.session.prepare.stitch_many",
        lambda *args, **kwargs: found.extend(stitch(*args, **kwargs)) or found[-1:],
    )
    arguments = ["ask", "Which colour?", *texts, "--model", str(model_folder), "--no-compare"]
    for flags in ([], ["--kv-fp8"]):
        assert CliRunner().invoke(app, [*arguments, *flags]).exit_code == 0
    assert [cache.kv_dtype for cache in found] == [None, torch.float8_e4m3fn]


def test_ask_by_another_selector(model_folder: Path, texts: list[str]) -> None:
    arguments = ["ask", "Which colour?", *texts, "--model", str(model_folder)]
    options = ["--ratio", "0.3", "--max-new-tokens", "3", "--selector", "epic:by=tokens"]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert "epic:by=tokens" in result.output


@pytest.mark.parametrize("compare", ["--compare", "--no-compare"])
def test_ask_plans_the_ratio(
    model_folder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, compare: str
) -> None:
    planner = Planner(ModelShape.of(tiny_model("llama")), ROWS_COST)
    monkeypatch.setattr("ifkv.planning.planner.planner_for", lambda *args, **kwargs: planner)
    asked, choose = [], Ratios.chooser
    monkeypatch.setattr(
        Ratios,
        "chooser",
        lambda self, ratio, *args, **kwargs: (
            asked.append(ratio) or choose(self, ratio, *args, **kwargs)
        ),
    )
    arguments = ["ask", "Which colour?", *texts, "--model", str(model_folder), compare]
    result = CliRunner().invoke(app, [*arguments, "--ratio", "auto", "--max-new-tokens", "3"])
    assert result.exit_code == 0, result.output
    assert "auto" in asked
    assert ("planned:" in result.output) == (compare == "--compare")


@pytest.mark.parametrize("ratio", ["automatic", "2", "-0.5", "nan"])
def test_ask_names_a_ratio_that_is_none(texts: list[str], ratio: str) -> None:
    arguments = ["ask", "Why?", *texts, "--model", "no/such/model", f"--ratio={ratio}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert f"'{ratio}' is neither 'auto'" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("command", ["ask", "plan"])
def test_the_selector_that_help_shows_is_the_sessions(command: str) -> None:
    function = getattr(importlib.import_module(f"ifkv.cli.{command}"), command)
    assert inspect.signature(function).parameters["selector"].default == DEFAULT_SELECTOR


@pytest.mark.parametrize("flags", [["--reorder"], ["--selector", "epic"]])
def test_ask_refuses_what_cannot_be_planned_before_the_model_is_loaded(
    texts: list[str], flags: list[str]
) -> None:
    arguments = ["ask", "Why?", *texts, "--model", "no/such/model", "--ratio", "auto", *flags]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, InvalidInputError)
    assert "ratio='auto'" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "MODEL", "--tokens", "99", "--selector", "epic"], "with selector='epic'"),
        (["verify", "no/such/model"], "neither a folder with a model"),
        (["verify", "./no/such/model"], "there is no folder ./no/such/model"),
        (["ask", "Why?", "missing.txt", "--model", "MODEL"], "missing.txt: there is no such file"),
        (["ask", "Why?", "FILE", "--model", "no/such/model"], "neither a folder with a model"),
        (["ask", " ", "FILE", "--model", "MODEL"], "the question is"),
        (["ask", "Why?", "FILE", "--model", "no", "--selector", "best"], "choose one of attention"),
        (["verify", "MODEL", "--dtype", "int8"], "dtype 'int8' is unknown"),
    ],
)
def test_bad_input_is_named(
    model_folder: Path, texts: list[str], arguments: list[str], message: str
) -> None:
    named = {"MODEL": str(model_folder), "FILE": texts[0]}
    result = CliRunner().invoke(app, [named.get(word, word) for word in arguments])
    assert result.exit_code != 0
    assert isinstance(result.exception, InvalidInputError)
    assert message in str(result.exception)


def test_an_error_is_a_sentence_and_not_a_traceback() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from ifkv.cli import main; main()", "verify", "no/such/model"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("Error: 'no/such/model'")
    assert "Traceback" not in run.stderr


def test_a_terminal_that_is_not_utf8_gets_question_marks(
    model_folder: Path, texts: list[str]
) -> None:
    command = [sys.executable, "-c", "from ifkv.cli import main; main()", "ask", "Which – one?"]
    run = subprocess.run(
        [*command, *texts, "--model", str(model_folder), "--max-new-tokens", "2"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode()
    assert b"Which ? one?" in run.stdout


@pytest.mark.parametrize("command", ["demo", "ask", "encode", "eval", "plan", "verify", "store"])
def test_help_teaches(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output) > 300
    assert f"Example: ifkv {command}" in " ".join(result.output.split())


def test_the_package_can_be_run_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ifkv", "eval", "--summarize-only", "--out", str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "holds no evaluation" in told.stderr
    assert "Traceback" not in told.stderr
