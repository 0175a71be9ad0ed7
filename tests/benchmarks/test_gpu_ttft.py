"""The GPU benchmark's arithmetic, its files, and its whole course on a tiny model."""

import json
import subprocess
import sys

import pytest
import torch
import transformers

import gpu_ttft
import gpu_ttft_report
import gpu_workload
from flashinfer_standin import FlashInferStandIn
from ifkv.backends.flashinfer import FlashInferBackend
from ifkv.selectors import DEFAULT_SELECTOR, resolve
from ifkv.testing import tiny_model

SCRIPT = gpu_ttft.__file__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing():
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.strip().startswith("gpu_ttft.py needs a CUDA device")


def test_it_explains_its_options_without_a_gpu():
    run = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True
    )
    for option in ("--minutes", "--lengths", "--models", "--repeats", "--mask", "--selector"):
        assert option in run.stdout


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen3-8B"])
def test_shapes_are_eight_billion_parameters_and_reach_128k(name):
    kind, sizes = gpu_workload.MODELS[name]
    config = getattr(transformers, kind)(**sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(8.1e9, rel=0.02)
    assert config.max_position_embeddings >= max(gpu_ttft.LENGTHS)


def test_it_measures_a_tiny_model_from_end_to_end(monkeypatch, tmp_path):
    sizes = {"DOCUMENT": 20, "PREFIX": 2, "PROMPT": 5, "QUESTION": 3, "NEW_TOKENS": 3}
    for name, value in sizes.items():
        monkeypatch.setattr(gpu_workload, name, value)
    backend = FlashInferBackend(FlashInferStandIn(relaxed=True), workspace_bytes=2**20)
    model = tiny_model("qwen3")
    rule = resolve(DEFAULT_SELECTOR)
    rows = gpu_ttft_report.with_shares(
        list(gpu_ttft.measure(model, backend, "tiny", 100, 2, rule, lambda: False))
    )
    assert [row["ratio"] for row in rows] == list(gpu_ttft.RATIOS)
    assert rows[0]["context"] == 92
    assert rows[0]["selector"] == DEFAULT_SELECTOR
    assert rows[0]["rows"] == 13
    assert set(rows[0]["full_prefill_seconds"]) == {"sdpa", "flashinfer"}
    table = gpu_ttft_report.write(tmp_path, {"gpu": "none", "repeats": 2}, rows)
    assert json.loads((tmp_path / "gpu_ttft.json").read_text())["rows"][0]["rows"] == 13
    assert (tmp_path / "gpu_ttft.md").read_text() == table
    assert table.count("\n| tiny | 100 |") == 3


def test_no_setting_begins_when_time_is_up():
    backend = FlashInferBackend(FlashInferStandIn(relaxed=True), workspace_bytes=2**20)
    model, rule = tiny_model("qwen3"), resolve(DEFAULT_SELECTOR)
    assert list(gpu_ttft.measure(model, backend, "tiny", 200, 1, rule, lambda: True)) == []


def test_both_baselines_compute_the_same():
    model = tiny_model("llama")
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        want = model(ids).logits
        model.set_attn_implementation(
            gpu_ttft.register_flashinfer_attention(FlashInferStandIn(relaxed=True))
        )
        got = model(ids).logits
    torch.testing.assert_close(got, want)


def test_shares_are_of_the_better_baseline():
    row = {
        "full_prefill_seconds": {"sdpa": 3.0, "flashinfer": 2.0},
        "ttft_seconds": 0.5,
        "bound": 5.0,
    }
    (done,) = gpu_ttft_report.with_shares([row])
    assert done["speedup"] == 4.0
    assert done["share_of_bound"] == 0.8


def test_the_table_says_whether_the_target_is_reached():
    row = {
        "model": "m",
        "length": 32768,
        "ratio": 0.15,
        "full_prefill_seconds": {"sdpa": 3.0, "flashinfer": 2.0},
        "steps": {"stitch": 0.001, "select": 0.02, "recompute": 0.4},
        "select_launched_seconds": 0.04,
        "ttft_seconds": 0.42,
        "peak_gb": 30.0,
        "full_prefill_peak_gb": 29.0,
        "decode_tokens_per_second": {"full prefill": 30.0, "ifkv": 40.0},
        "speedup": 4.76,
        "bound": 5.0,
        "share_of_bound": 0.95,
    }
    table = gpu_ttft_report.as_markdown({"repeats": 5}, [row, row | {"share_of_bound": 0.5}])
    assert "reached in 1 of 2 settings" in table
    assert "| 3000 / 2000 ms | 1.0 ms | 20.0 ms (40.0) | 400.0 ms | 420 ms |" in table
