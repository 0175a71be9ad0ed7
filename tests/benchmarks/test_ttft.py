"""The benchmark of time to first token: its dense-mask rival is right, and its numbers are kept."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import choosing
import ifkv
import ttft
from bench_models import load
from dense_mask import OverwritingCache, recompute_densely
from ifkv.testing import assert_close, assert_within_floor, dense_prefill, tiny_model, truth_model
from peak_memory import in_own_process, peak_above, resident
from ttft_report import cells, merge, peak_share

PREFIX, PROMPT = [1, 2, 3], [9, 8, 7, 6]
DOCUMENTS = [[5, 11, 13] * 7, [17, 19] * 9, [23, 29, 31] * 6]
SLOTS = torch.tensor([24, 25, 26, 31, 40, 41, 55, 58])


def ours_and_dense(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Logits of both, and both caches' keys and values at the context's slots, layer by layer."""
    with ifkv.patch(model, backend="reference"):
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX)
        cache = ifkv.stitch(model, documents)
        dense = OverwritingCache(cache, SLOTS, len(PROMPT))
        logits = ifkv.recompute(model, cache, SLOTS, prompt_ids=PROMPT)
    found = recompute_densely(model, dense, cache.token_ids, PROMPT)
    pairs = [
        (got, want)
        for layer, rows in zip(cache.layers, dense.rows, strict=True)
        for got, want in zip((layer.keys, layer.values), rows, strict=True)
    ]
    return logits, found, pairs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_dense_mask_computes_what_we_do(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    logits, dense, pairs = ours_and_dense(model)
    assert_close(logits, dense, what="logits")
    for got, want in pairs:
        assert_close(got, want, what="keys or values")


def test_the_dense_mask_is_as_near_to_the_truth_in_half_precision() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    logits, dense, _ = ours_and_dense(model)
    truth, _, _ = ours_and_dense(truth_model(model))
    assert_within_floor(logits, dense, truth, what="our logits beside the dense mask's")
    assert_within_floor(dense, logits, truth, what="the dense mask's logits beside ours")


def test_the_dense_mask_with_every_slot_is_a_full_prefill() -> None:
    model = tiny_model()
    with ifkv.patch(model):
        cache = ifkv.stitch(model, ifkv.prefill_documents(model, DOCUMENTS, prefix=PREFIX))
    slots = torch.arange(cache.context_length)
    dense = OverwritingCache(cache, slots, len(PROMPT))
    found = recompute_densely(model, dense, cache.token_ids, PROMPT)
    full = dense_prefill(model, [*cache.token_ids.tolist(), *PROMPT])
    assert_close(found, full.logits[-1], what="logits")


def test_a_run_in_pieces_fills_one_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = ["--models", "tiny", "--repeats", "2", "--results", str(tmp_path), "--only", "times"]
    ttft.main([*common, "--lengths", "700", "--dtypes", "float32", "--ratios", "0.3,0.6"])
    ttft.main(
        [*common, "--lengths", "600,700", "--dtypes", "bfloat16", "--ratios", "0.4",
         "--dense-ratios", "0.4"]
    )  # fmt: skip
    rows = json.loads((tmp_path / "ttft-cpu.json").read_text())["rows"]
    assert [(row["dtype"], row["context"], row["ratio"]) for row in rows] == [
        ("float32", 700, 0.3),
        ("float32", 700, 0.6),
        ("bfloat16", 600, 0.4),
        ("bfloat16", 700, 0.4),
    ]
    for row in rows:
        assert row["repeats"] == 2
        assert row["ttft_seconds"] > 0.9 * sum(row["steps"].values())
        assert row["share_of_bound"] == pytest.approx(row["speedup"] / row["bound"])
        assert (row.get("dense_over_recompute", 0) > 0) == (row["dtype"] == "bfloat16")
    table = (tmp_path / "ttft-cpu.md").read_text()
    assert all(f"| {' | '.join(cells(row))} |" in table for row in rows)
    assert capsys.readouterr().out.count("tiny model") == len(rows)


def test_a_peak_joins_the_row_that_it_belongs_to() -> None:
    base = {"model": "m", "dtype": "float32", "context": 8192, "ratio": 0.15}
    peak = {"peak_extra_bytes": 5 << 20, "weight_bytes": 60 << 20, "stitched_bytes": 40 << 20}
    (row,) = merge([base | {"speedup": 2.0, "repeats": 3}], [base | peak])
    assert row["speedup"] == 2.0
    assert peak_share(row) == pytest.approx(0.05)
    assert cells(row)[-1] == "5 MiB, 5.0%"
    assert peak_share(base) is None


def test_a_peak_is_seen_and_what_was_there_before_is_not() -> None:
    if resident() == 0:
        pytest.skip("no /proc to ask")
    size = 64 << 20
    held = torch.ones(size, dtype=torch.uint8)

    def run() -> None:
        more = torch.ones(size, dtype=torch.uint8)
        time.sleep(0.1)  # on a busy machine the watching thread gets its turn late
        assert int(more[-1]) == 1

    peak = peak_above(run)
    assert 0.9 * size < peak < 1.5 * size
    assert int(held[-1]) == 1


def test_a_measurement_in_its_own_process_comes_back_or_fails_loudly() -> None:
    assert in_own_process(divmod, 7, 2) == (3, 1)
    with pytest.raises(RuntimeError, match="divmod failed"):
        in_own_process(divmod, 7, 0)


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--models", "gpt9", "gpt9 unknown; choose from smollm2"),
        ("--dtypes", "int8", "int8 unknown"),
        ("--ratios", "0.1,2", "up to 1"),
        ("--ratios", "", "up to 1"),
        ("--repeats", "0", "at least 1"),
        ("--lengths", "many", "--lengths"),
    ],
)
def test_bad_options_are_refused(
    option: str, value: str, rule: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        ttft.parse([option, value])
    assert rule in capsys.readouterr().err


def test_what_choosing_takes_is_measured_for_each_selector() -> None:
    names = ["epic", "sink-aware"]
    rows = choosing.measure(*load("tiny", torch.float32), [256], names, 0.15, 1)
    assert [row["selector"] for row in rows] == names
    nothing, looking = rows
    assert nothing["choosing_flops"] == 0 < looking["choosing_flops"]
    for row in rows:
        assert 0 < row["choosing"] < row["request"]
        assert row["choosing_flops"] < row["request_flops"]
    about = dict.fromkeys(("processor", "threads", "torch", "transformers", "date"), "x")
    found = {"about": about, "model": "m", "dtype": "d", "ratio": 0.15, "rounds": 1, "rows": rows}
    assert choosing.markdown(found).count("| 256 |") == len(names)
