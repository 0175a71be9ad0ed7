"""What the command line refuses, before any work and in words; and what Ctrl-C leaves."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as bars
from typer.testing import CliRunner

import ifkv.store.populate
from ifkv.cli import app
from ifkv.cli.read_files import read_corpus, read_texts
from ifkv.documents.source import Source
from ifkv.errors import IfkvError, InvalidInputError, UnsupportedModelError
from ifkv.testing import tiny_model, tiny_tokenizer

POSITIONS = 256
MAIN = [sys.executable, "-c", "from ifkv.cli import main; main()"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = POSITIONS  # beyond which transformers warns by itself
    options: Any = {"vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS}
    tiny_model("llama", dtype=torch.float32, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that must not be read."""
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with two files."""
    monkeypatch.chdir(tmp_path)
    Path("lamp.txt").write_text("The lamp is red.")
    Path("long.md").write_text("".join(f"The door {n} is green. " for n in range(24)))
    return tmp_path


def refused(*arguments: object) -> IfkvError:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, IfkvError), result.output
    assert not result.output, "something was printed before the refusal"
    return result.exception


@pytest.mark.usefixtures("here", "unloaded")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", " ", "lamp.txt"], "the question is ' '"),
        (["ask", "Why?", "lamp.txt", "--device", "nonsense"], "device 'nonsense' cannot be used"),
        (["ask", "Why?", "lamp.txt", "--dtype", "int8"], "dtype 'int8' is unknown"),
        (["ask", "Why?", "lamp.txt", "--store", "lamp.txt"], "folder .*lamp.txt cannot be used"),
        (["ask", "Why?", "lamp.txt", "--html", "out/page.html"], "there is no folder out; make it"),
        (["ask", "Why?", "lamp.txt", "--html", "."], "--html is ., a folder"),
        (["demo", "--html", "out/page.html"], "there is no folder out; make it"),
        (["encode", "lamp.txt", "--device", "nonsense"], "device 'nonsense' cannot be used"),
        (["encode", "lamp.txt", "--dtype", "int8"], "dtype 'int8' is unknown"),
        (["encode", "lamp.txt", "--store", "lamp.txt"], "folder .*lamp.txt cannot be used"),
        (["encode", "lamp.txt", "--codec", "zip"], "codec"),
        (["encode", "lamp.txt", "--max-bytes", "lots"], "'lots' is no size"),
        (["eval", "--data", "needle", "--out", "lamp.txt"], "lamp.txt is a file; name a folder"),
        (["eval", "--data", "needle", "--out", "o", "--dtype", "int8"], "dtype 'int8' is unknown"),
        (["eval", "--data", "needle", "--out", "o", "--device", "x"], "device 'x' cannot be used"),
        (["verify", "MODEL", "--device", "nonsense"], "device 'nonsense' cannot be used"),
    ],
)
def test_what_can_be_refused_is_refused_before_the_weights_are_read(
    model_folder: Path, arguments: list[str], message: str
) -> None:
    if arguments[0] in ("ask", "encode", "eval"):
        arguments = [*arguments, "--model", "MODEL"]
    told = refused(*(str(model_folder) if word == "MODEL" else word for word in arguments))
    with pytest.raises(IfkvError, match=message):
        raise told
    assert not Path("out").exists()
    assert not Path("o").exists()


@pytest.mark.usefixtures("here", "unloaded")
@pytest.mark.parametrize("command", [["ask", "Why?"], ["encode"]])
def test_a_model_that_is_none_is_named_without_transformers_words(command: list[str]) -> None:
    Path("empty").mkdir()
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "gpt2"}')
    for name, message in (
        ("no/such/model", "'no/such/model' is neither a folder with a model nor a hub id"),
        ("./no", "there is no folder ./no"),
        ("empty", "'empty' has no config.json, so there is no model in it"),
        ("other/config.json", "other/config.json is a file; give the folder"),
    ):
        told = refused(*command, "lamp.txt", "--model", name)
        assert isinstance(told, InvalidInputError)
        assert message in str(told)
        assert "repo_type" not in str(told)
        assert "tokenizer that" not in str(told)
    assert isinstance(refused(*command, "lamp.txt", "--model", "other"), UnsupportedModelError)


@pytest.mark.usefixtures("here")
def test_settings_that_a_model_refuses_are_refused_before_documents_are_made(
    model_folder: Path,
) -> None:
    folder = Path(shutil.copytree(model_folder, "model"))
    (folder / "generation_config.json").write_text('{"repetition_penalty": 0}')
    command = ["ask", "Why?", "lamp.txt", "--model", "model", "--store", "kept"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, InvalidInputError)
    assert "strictly positive float, but is 0" in str(result.exception)
    assert "prefill" not in result.output
    assert not list(Path().glob("kept/documents/*"))


@pytest.mark.usefixtures("here", "unloaded")
@pytest.mark.parametrize("command", [["ask", "Why?"], ["encode"]])
def test_a_file_that_is_too_long_is_named_with_the_way_out(
    model_folder: Path, command: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    told = str(refused(*command, "lamp.txt", "long.md", "--model", model_folder))
    assert "long.md has " in told
    assert "max_position_embeddings is 256" in told
    assert "--split" in told
    assert "lamp.txt" not in told
    assert not caplog.records, "transformers warned beside it"
    assert "--split" in str(refused(*command, "long.md", "--model", model_folder, "--split", 250))


@pytest.mark.usefixtures("here", "unloaded")
@pytest.mark.parametrize("command", [["ask", "Why?"], ["encode"]])
def test_a_document_is_named_by_file_and_line(model_folder: Path, command: list[str]) -> None:
    good = json.dumps({"text": "fine"})
    for line, message in (
        ("nonsense", "b.jsonl, line 3 is not JSON"),
        (json.dumps({"text": " "}), "b.jsonl, line 3: the field 'text' is blank"),
        (json.dumps({"text": "caf\udc80"}), "b.jsonl:3: a text holds '\\udc80', half of a"),
        (json.dumps({"text": "Rain. " * 200}), "b.jsonl:3 has "),
    ):
        Path("b.jsonl").write_text(f"{good}\n\n{line}\n{good}\n")
        told = str(refused(*command, "lamp.txt", "b.jsonl", "--model", model_folder))
        assert message in told


@pytest.mark.usefixtures("here", "unloaded")
@pytest.mark.parametrize("command", [["ask", "Why?"], ["encode"]])
def test_a_tokenizer_of_a_larger_vocabulary_is_refused_naming_the_file(
    model_folder: Path, tmp_path: Path, command: list[str]
) -> None:
    copied = shutil.copytree(model_folder, tmp_path / "copied")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"vocab_size": 80}))
    told = str(refused(*command, "long.md", "--split", 99, "--model", copied))
    assert "long.md becomes the token id " in told
    assert "ids run from 0 to 79" in told


@pytest.mark.usefixtures("here", "unloaded")
def test_files_that_are_too_long_together_are_refused(model_folder: Path) -> None:
    told = str(refused("ask", "Why?", "long.md", "--model", model_folder, "--split", 60))
    assert "tokens in all" in told
    assert "Ask over fewer: other files" in told
    assert "--retrieve" in told


@pytest.mark.usefixtures("here")
def test_a_long_file_is_cut_into_documents(model_folder: Path) -> None:
    options = ["--model", str(model_folder), "--store", "kept", "--split", "60"]
    made = CliRunner().invoke(app, ["encode", "lamp.txt", "long.md", *options])
    assert made.exit_code == 0, made.output
    assert "documents: " in made.output
    assert ", 0 given twice" in made.output
    Path("long.md").write_text("".join(f"The door {n} is green. " for n in range(4)))
    asked = ["ask", "Why?", "lamp.txt", "long.md", *options[:-1], "30", "--max-new-tokens", "2"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert re.search(r"long\.md:1 \(\d of \d\)", result.output)
    assert "lamp.txt (" not in result.output


@pytest.mark.usefixtures("here")
def test_one_document_is_no_plural_and_pages_are_named_as_given(
    model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert bars.is_progress_bar_enabled()
    ask = ["ask", "Why?", "lamp.txt", "--model", str(model_folder), "--max-new-tokens", "2"]
    for flag in ("--compare", "--no-compare"):
        result = CliRunner().invoke(app, [*ask, flag, "--html", "page.html"])
        assert result.exit_code == 0, result.output
        assert "\nwrote page.html\n" in result.output
        assert ("1 document, " in result.output) == (flag == "--compare")
        assert "Loading weights" not in result.output + capfd.readouterr().err
    assert bars.is_progress_bar_enabled(), "transformers' own bars were not turned on again"
    result = CliRunner().invoke(app, ["encode", *ask[2:5]])
    assert result.stdout.startswith("1 document: 0 encoded, 1 already there")


def test_every_bad_file_is_named_with_its_reason(here: Path) -> None:
    contents = {
        "picture.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "zeros.txt": b"a\0b",
        "latin.txt": "Stra\xdfe".encode("latin-1"),
        "paper.pdf": b"%PDF-1.4\n%\xe2\xe3\xcf\xd3",
        "wide.txt": "hello".encode("utf-16"),
        "blank.txt": b" \n",
    }
    for name, data in contents.items():
        Path(name).write_bytes(data)
    (here / "folder").mkdir()
    for name, message in (
        ("missing.txt", "missing.txt: there is no such file"),
        ("folder", "folder is a folder; give the files in it, for example folder/*.md"),
        ("picture.png", "picture.png is not text"),
        ("zeros.txt", "zeros.txt is not text"),
        ("latin.txt", "latin.txt is not UTF-8 at byte 4 (0xdf)"),
        ("paper.pdf", "paper.pdf is a PDF"),
        ("wide.txt", "wide.txt is UTF-16"),
        ("blank.txt", "blank.txt is blank"),
    ):
        with pytest.raises(InvalidInputError) as told:
            read_texts([Path(name)])
        assert message in str(told.value)
    with pytest.raises(InvalidInputError) as told:
        read_texts([Path(name) for name in ("lamp.txt", "missing.txt", "folder", "latin.txt")])
    lines = str(told.value).splitlines()
    assert lines[0].startswith("3 of the files")
    assert [line.split()[0].strip(":") for line in lines[1:]] == [
        "missing.txt",
        "folder",
        "latin.txt",
    ]


def test_a_byte_order_mark_is_no_text(here: Path) -> None:
    Path("marked.jsonl").write_text('\ufeff{"text": "hello"}\n')
    assert read_corpus([Path("marked.jsonl")], "text") == [
        (Source("marked.jsonl", "marked.jsonl", line=1), "hello")
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "b.jsonl, line 2 is not JSON: Expecting value at column 1"),
        ("[1]", "line 2 is a list; give an object"),
        ("3", "line 2 is a number; give an object"),
        ('{"title": "a", "body": "b"}', "no field 'text' (its fields: 'title', 'body')"),
        ("{}", "no field 'text' (its fields: none)"),
        ('{"text": ["a"]}', "the field 'text' is a list"),
        ('{"text": null}', "the field 'text' is null"),
        ('{"text": true}', "the field 'text' is true or false"),
        ('{"text": " "}', "the field 'text' is blank"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named_in_the_words_of_json(here: Path, line: str, message: str) -> None:
    Path("b.jsonl").write_text(json.dumps({"text": "fine"}) + f"\n{line}\n")
    with pytest.raises(InvalidInputError) as told:
        read_corpus([Path("b.jsonl")], "text")
    assert message in str(told.value)
    assert "Error" not in str(told.value)


def test_exit_codes(here: Path) -> None:
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "gpt2"}')
    ask = ["ask", "Why?", "lamp.txt", "--model"]
    for arguments, code, start in (
        ([*ask, "no/such/model"], 2, "Error: 'no/such/model'"),  # what was given is wrong
        ([*ask, "other", "--ratio", "7"], 2, "Usage: "),
        ([*ask, "other"], 2, "Error: "),  # so is a model of an unknown family
    ):
        run = subprocess.run([*MAIN, *arguments], capture_output=True, text=True, check=False)
        assert run.returncode == code, run.stderr
        assert run.stderr.strip().startswith(start)
        assert "InputError" not in run.stderr


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Press Ctrl-C in the course of a prefill, once."""
    prefill, calls = ifkv.store.populate.prefill_documents, []

    def pressed(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return prefill(*args, **kwargs)

    monkeypatch.setattr(ifkv.store.populate, "prefill_documents", pressed)


@pytest.mark.usefixtures("here")
def test_ctrl_c_says_what_is_kept(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("door.txt").write_text("The door is green.")
    options = ["--model", str(model_folder), "--store", "kept"]
    encode = ["encode", "lamp.txt", "door.txt", *options, "--batch-tokens", "1"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        result = CliRunner().invoke(app, encode)
    assert result.exit_code == 130
    told = result.stderr.strip().splitlines()[-1]
    assert (
        told == "Interrupted. The store has 1 of 2 documents; the same command goes on from there."
    )
    assert "2 documents: 1 encoded, 1 already there" in CliRunner().invoke(app, encode).output

    ask = ["ask", "Why?", "lamp.txt", "long.md", "--split", "20", "--model", str(model_folder)]
    Path("long.md").write_text("The door is green and old. " * 3)
    for place, message in (("other", "The store has 0 of "), ("memory", "nothing is kept")):
        with monkeypatch.context() as patch:
            interrupt_at(patch, 1)
            result = CliRunner().invoke(app, [*ask, "--store", place])
        assert result.exit_code == 130
        assert message in result.stderr.strip().splitlines()[-1]


@pytest.mark.usefixtures("here")
def test_ctrl_c_in_an_evaluation_says_what_is_kept(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {"input": "Which?", "answers": ["red"], "context": "Passage 1:\nRed.\nPassage 2:\nRain."}
    lines = [json.dumps({**line, "_id": str(number)}) for number in range(2)]
    Path("data.jsonl").write_text("\n".join(lines))
    full, asked = ifkv.evaluation.runner.Trial, []

    def pressed(bench: Any, question: Any) -> Any:
        asked.append(question)
        if len(asked) in (2, 4):
            raise KeyboardInterrupt
        return full(bench, question)

    monkeypatch.setattr("ifkv.evaluation.runner.Trial", pressed)
    command = ["eval", "--data", "data.jsonl", "--model", str(model_folder), "--out", "results"]
    command += ["--selectors", "epic", "--ratios", ".3", "--max-new-tokens", "2", "--split", "8"]
    result = CliRunner().invoke(app, [*command, "--short-answer", ""])
    assert result.exit_code == 130, result.output
    assert "results holds 1 of 2 questions; the same command" in result.stderr
    # Done now, then with a further way that only the first question has when it is interrupted.
    assert CliRunner().invoke(app, [*command, "--short-answer", ""]).exit_code == 0
    further = [*command, "--short-answer", "", "--selectors", "epic,recency"]
    result = CliRunner().invoke(app, further)
    assert result.exit_code == 130, result.output
    assert "results holds 0 of 2 questions" in result.stderr


@pytest.mark.usefixtures("here")
def test_ctrl_c_before_an_evaluation_has_a_folder(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("ifkv.evaluation.run", pressed)
    result = CliRunner().invoke(
        app, ["eval", "--data", "needle", "--model", str(model_folder), "--out", "none"]
    )
    assert result.exit_code == 130, result.output
    assert "none holds 0 of " in result.stderr
    assert not Path("none").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals are otherwise there")
def test_a_real_signal_before_anything_was_computed(here: Path, model_folder: Path) -> None:
    os.mkfifo("slow.txt")  # a file that never comes
    run = subprocess.Popen(
        [*MAIN, "ask", "Why?", "slow.txt", "--model", str(model_folder)],
        stderr=subprocess.PIPE,
        text=True,
        # Children of a job in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with contextlib.ExitStack() as cleaning:
        cleaning.callback(run.kill)
        # Opens as soon as the command reads it.
        cleaning.callback(os.close, os.open("slow.txt", os.O_WRONLY))
        time.sleep(1)  # it waits for the file by now; a signal before the wait would go unnoticed
        run.send_signal(signal.SIGINT)
        _, told = run.communicate(timeout=120)
    assert run.returncode == 130
    assert told.strip() == "Interrupted. Nothing had been computed yet."
