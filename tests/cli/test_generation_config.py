"""The command line follows a model's generation_config.json, or refuses it in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ifkv.cli import app
from ifkv.testing import tiny_model, tiny_tokenizer

QUESTION = "Which?"
EVEN = list(range(0, 260, 2))


@pytest.mark.parametrize(
    "said",
    [
        {"return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 3},
        {"stop_strings": ["a"]},
        {"suppress_tokens": EVEN, "num_beams": 2, "do_sample": True},
    ],
)
def test_the_laws_hold_whatever_the_file_says(folder: Path, said: dict[str, Any]) -> None:
    (folder / "model" / "generation_config.json").write_text(json.dumps(said))
    result = CliRunner().invoke(app, ["verify", str(folder / "model"), "--length", "16"])
    assert result.exit_code == 0, result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer()
    model = tiny_model(dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=2048)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "lamp.txt").write_text("The lamp is red.")
    return tmp_path


def ask_in(folder: Path, said: dict[str, Any] | str, *options: str) -> Any:
    text = said if isinstance(said, str) else json.dumps(said)
    (folder / "model" / "generation_config.json").write_text(text)
    arguments = ["ask", QUESTION, str(folder / "lamp.txt"), "--model", str(folder / "model")]
    return CliRunner().invoke(app, [*arguments, "--store", "memory", *options])


@pytest.mark.parametrize("options", [(), ("--no-compare",)])
def test_the_command_line_follows_the_file(folder: Path, options: tuple[str, ...]) -> None:
    result = ask_in(folder, {"num_beams": 4, "max_new_tokens": 3}, *options)
    assert result.exit_code == 0, result.output
    assert "cut off at 3 tokens" in " ".join(result.output.split())
    said = "num_beams=4; a comparison decodes greedily" in " ".join(result.output.split())
    assert said == (not options)
    result = ask_in(folder, {"max_new_tokens": 3}, "--max-new-tokens", "5", *options)
    assert "cut off at 5 tokens" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num_return_sequences": 2, "num_beams": 2}, "num_return_sequences is 2"),
        ({"max_length": 20}, "max_length is 20"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ("{", "generation_config.json cannot be used"),
    ],
)
def test_the_command_line_refuses_before_the_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: Any, message: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("ifkv.cli.load_model.load_model", refuse)
    result = ask_in(folder, said)
    assert result.exit_code != 0
    assert not isinstance(result.exception, AssertionError)
    shown = " ".join(f"{result.output} {result.exception}".split())
    assert message in shown
