"""The command `ifkv plan`, on rates that are told to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ifkv.cli import app
from ifkv.cost import ModelShape
from ifkv.errors import InvalidInputError, UnsupportedModelError
from ifkv.planning.calibration import kept
from ifkv.testing import tiny_model
from rates import PASSES_COST, flat, ideal, never_measured

MODEL = tiny_model("llama", dtype=torch.float32, max_position_embeddings=512)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    """How often the machine was to be measured; and the folder is empty."""
    return never_measured(monkeypatch, tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    MODEL.config.save_pretrained(tmp_path / "config")  # and no weights
    return str(tmp_path / "config")


@pytest.mark.filterwarnings("ignore::ifkv.errors.CalibrationWarning")
def test_plan_needs_a_config_alone(measured, folder: str) -> None:
    ask = ["plan", folder, "--tokens", "400", "--query", "10"]
    result = CliRunner().invoke(app, ask)
    assert result.exit_code == 0, result.output
    for words in ("r = 0.05", "r = 0.15", "r = 0.3", "full prefill", "Recommended: r = 0.3", "kB"):
        assert words in result.output
    CliRunner().invoke(app, [*ask, "--recalibrate"])
    own = CliRunner().invoke(app, [*ask, "--ratio", "0.1", "--ratio", "0.2", "--speedup", "6"])
    assert "Recommended: r = 0.1" in own.output
    assert "r = 0.3" not in own.output
    assert len(measured) == 2


@pytest.mark.filterwarnings("ignore::ifkv.errors.CalibrationWarning")
def test_plan_counts_the_first_document_behind_a_surrogate_context(measured, folder: str) -> None:
    ask = ["plan", folder, "--tokens", "400", "--documents", "1", "--ratio", "0.3"]
    assert " 120 " not in CliRunner().invoke(app, ask).output
    assert " 120 " in CliRunner().invoke(app, [*ask, "--behind-surrogate"]).output


@pytest.mark.filterwarnings("ignore::ifkv.errors.CalibrationWarning")
def test_plan_says_when_rates_look_like_those_of_a_busy_machine(
    measured, folder: str, monkeypatch
) -> None:
    found = {"rates": ideal(ModelShape.of(MODEL), 1e9)}
    monkeypatch.setattr(kept, "measure", lambda *_, **__: found["rates"])

    def said(*options: str) -> str:
        ask = ["plan", folder, "-n", "400", *options]
        return " ".join(CliRunner().invoke(app, ask).output.split())

    sound = found["rates"]
    assert "probably busy" not in said("--recalibrate")
    for changes, words in (
        ({"prefill_attention": flat(1e7)}, "times the operations"),  # far faster than S(r)
        ({"rows_attention": flat(1e7)}, "times the operations"),  # slower than full prefill
        ({"disagreement": 2.34}, "differ by a factor of 2.3"),
    ):
        found["rates"] = dataclasses.replace(sound, **changes)
        assert words in said("--recalibrate"), changes
        again = said()  # by the rates that are kept
        assert words in again
        assert again.count("probably busy") == 1
        assert "--recalibrate" in again
    found["rates"] = dataclasses.replace(sound, disagreement=1.5)
    assert "probably busy" not in said("--recalibrate")


@pytest.mark.filterwarnings("ignore::ifkv.errors.CalibrationWarning")
def test_plan_names_the_model_and_not_the_way_to_it(measured, folder: str, monkeypatch) -> None:
    ask = ["--tokens", "100"]
    title = CliRunner().invoke(app, ["plan", folder, *ask]).output.splitlines()
    assert any(line.strip().startswith("config, float32, cpu") for line in title)
    assert folder not in "".join(title)
    monkeypatch.chdir(folder)
    assert "config, float32" in CliRunner().invoke(app, ["plan", ".", *ask]).output


@pytest.mark.filterwarnings("ignore::ifkv.errors.CalibrationWarning")
def test_plan_recommends_plain_prefill(measured, folder: str, monkeypatch) -> None:
    monkeypatch.setattr(kept, "measure", lambda *_, **__: PASSES_COST)
    result = CliRunner().invoke(app, ["plan", folder, "-n", "100"])
    assert "Recommended: full prefill" in result.output


@pytest.mark.filterwarnings("ignore::ifkv.errors.CalibrationWarning")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-n", "600"], "512 positions"),
        (["-n", "5"], "8 documents cannot be made of 5 tokens"),
        (["-n", "100", "--dtype", "int8"], "'int8' is unknown"),
        (["-n", "100", "--device", "abacus"], "'abacus' cannot be used"),
        (["-n", "100", "--speedup", "-1"], "speedup is -1"),
        (["-n", "100", "--speedup", "nan"], "speedup is nan"),
        (["-n", "510", "--query", "3"], "512 positions"),
    ],
)
def test_plan_refuses_bad_input(measured, folder: str, options, words) -> None:
    result = CliRunner().invoke(app, ["plan", folder, *options])
    assert result.exit_code == 1
    assert words in str(result.exception)
    assert measured == []


def test_plan_refuses_what_is_no_model(measured, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "-n", "10"])
    assert isinstance(result.exception, InvalidInputError)
    assert str(tmp_path) in str(result.exception)
    assert measured == []


def test_unsupported_families_are_refused_before_anything_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Gemma2Config

    monkeypatch.setenv("IFKV_CACHE", str(tmp_path / "cache"))
    Gemma2Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, vocab_size=64, max_position_embeddings=256,
    ).save_pretrained(tmp_path / "gemma")  # fmt: skip
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "gemma"), "-n", "100"])
    assert isinstance(result.exception, UnsupportedModelError)
    assert "gemma2" in str(result.exception)
    assert not (tmp_path / "cache").exists()
