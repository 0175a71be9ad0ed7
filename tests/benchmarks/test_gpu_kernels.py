"""The benchmark of kernel choices: its whole course on the stand-in, and that ways agree."""

import subprocess
import sys

import pytest
import torch

import gpu_kernels
from flashinfer_standin import FlashInferStandIn
from ifkv.backends.flashinfer import tiles
from ifkv.testing import assert_close


@pytest.fixture
def bench(monkeypatch):
    for name, value in {"DOCUMENT": 16, "PROMPT": 5, "QUESTION": 4}.items():
        monkeypatch.setattr(gpu_kernels, name, value)
    return gpu_kernels.Bench(64, 1, torch.device("cpu"), FlashInferStandIn(relaxed=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing():
    script = gpu_kernels.__file__
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.strip().startswith("gpu_kernels.py needs a CUDA device")


def test_it_measures_every_choice(bench):
    rows = [row for part in gpu_kernels.PARTS for row in part(bench)]
    assert len({(row["what"], row["how"]) for row in rows}) == len(rows)
    assert all(row["layer_ms"] > 0 for row in rows)
    table = gpu_kernels.as_markdown({"gpu": "none"}, rows)
    assert table.count("\n| ") == len(rows) + 1


def test_kernels_are_forced_where_a_call_may_choose(bench):
    slots = torch.arange(64)
    gpu_kernels.with_kernels("auto", gpu_kernels.attend(bench, slots))()
    assert bench.module.wrappers[-1]._backend == "fa3"
    gpu_kernels.with_kernels("fa2", gpu_kernels.attend(bench, slots))()
    assert bench.module.wrappers[-1]._backend == "fa2"


def test_both_ways_with_a_prefix_agree(bench):
    tensors = (
        bench.random(1, gpu_kernels.HEADS, 64, gpu_kernels.DIM),
        *(x[:, :, :64] for x in (bench.keys, bench.values)),
        *(bench.random(1, gpu_kernels.KV_HEADS, 7, gpu_kernels.DIM) for _ in range(2)),
    )
    ours = gpu_kernels.copied(bench, tensors)()()
    other = gpu_kernels.merged(bench, tensors)()()
    assert_close(other, ours[0], what="documents", tolerance=0.03)


def test_the_tile_is_that_of_the_plan(bench, monkeypatch):
    """And forms agree, whatever it is."""
    cut, seen = tiles.cut_rows, []

    def listening(slots, tile_rows, **how):
        seen.append(tile_rows)
        return cut(slots, tile_rows, **how)

    monkeypatch.setattr(tiles, "cut_rows", listening)
    slots = torch.arange(1, 60, 3)
    torch.manual_seed(0)
    want = gpu_kernels.attend(bench, slots, "split", 16)()()
    torch.manual_seed(0)
    got = gpu_kernels.attend(bench, slots, "positions", 4)()()
    assert_close(got, want, what="rows", tolerance=0.03, axes=("a", "b", "c", "d"))
    assert seen == [16, 4]
