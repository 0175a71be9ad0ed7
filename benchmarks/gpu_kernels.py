"""Times of kernels, masks and layouts on a GPU, from which the FlashInfer backend's were chosen.

    python benchmarks/gpu_kernels.py [--length 32768] [--repeats 10]

One layer in the shape of Llama-3.1-8B and Qwen3-8B (32 query heads, 8 key heads of 128), bfloat16.
Every choice is listed beside its alternatives. Times are taken between CUDA events; they are
medians after three runs that are not counted. They do not contain planning, which happens once per
forward. Writes gpu_kernels.json and gpu_kernels.md into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gpu_ttft import RESULTS, describe
from ifkv.backends.flashinfer import FlashInferBackend, calls, tiles
from ifkv.backends.norms import attention_norm, blocked_attention_norm
from ifkv.backends.plans import QueryPlan
from ifkv.backends.spec import AttentionSpec

HEADS, KV_HEADS, DIM = 32, 8, 128
SPEC = AttentionSpec(DIM**-0.5)
PROMPT = 64
QUESTION = 48
DOCUMENT = 512
# Clock cycles (about a millisecond) that keep the GPU busy while a run is launched. Without them,
# the time of a short run would be the time that the CPU takes to launch it.
HEAD_START = 2_000_000
Make = Callable[[], Callable[[], Any]]


class Bench:
    """Keys and values of one layer, and a timer.

    Args:
        length: Slots of the context.
        repeats: Runs that are counted.
        device: The compute device.
        module: FlashInfer.
    """

    def __init__(self, length: int, repeats: int, device: torch.device, module: Any = None):
        self.length, self.repeats, self.device, self.module = length, repeats, device, module
        self.capacity = -(-(length + PROMPT + 1) // 64) * 64
        self.keys = self.random(1, KV_HEADS, self.capacity, DIM)
        self.values = self.random(1, KV_HEADS, self.capacity, DIM)
        self._backends: dict[str, FlashInferBackend] = {}

    def random(self, *shape: int) -> Tensor:
        """Return a tensor of normally distributed numbers."""
        return torch.randn(*shape, dtype=torch.bfloat16, device=self.device)

    def backend(self, mask: str = "positions") -> FlashInferBackend:
        """Return the backend with this form of the mask; each is built once."""
        if mask not in self._backends:
            self._backends[mask] = FlashInferBackend(self.module, mask=mask)
        return self._backends[mask]

    def milliseconds(self, run: Callable[[], Any]) -> float:
        """Return the median duration of a run."""
        for _ in range(3):
            run()
        found = []
        for _ in range(self.repeats):
            if self.device.type != "cuda":
                start = time.perf_counter()
                run()
                found.append((time.perf_counter() - start) * 1e3)
                continue
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            first.record()
            run()
            last.record()
            torch.cuda.synchronize()
            found.append(first.elapsed_time(last))
        return statistics.median(found)

    def row(self, what: str, how: str, make: Make, flops: float = 0.0) -> dict[str, Any]:
        """Time one layer; ``make`` plans it and returns the function to time."""
        layer = self.milliseconds(make())
        return {
            "what": what,
            "how": how,
            "layer_ms": layer,
            "tflops": flops / layer / 1e9,
        }


def with_kernels(kernels: str | None, make: Make) -> Make:
    """Return a ``make`` that uses these kernels; None leaves the choice to ifkv."""
    if kernels is None:
        return make

    def choose(rows: Any, heads: int, *, masked: bool = False) -> str:
        return "fa2" if masked else kernels

    def made() -> Callable[[], Any]:
        with mock.patch.object(calls, "kernels", choose):
            run = make()
            run()  # the first run plans
        return run

    return made


def attention_flops(rows_times_keys: float) -> float:
    """Return the operations of attention over so many pairs of row and key."""
    return 4.0 * HEADS * DIM * rows_times_keys


def attend(
    bench: Bench, slots: Tensor, mask: str = "positions", tile: int = tiles.SPLIT_ROWS
) -> Make:
    """Return a ``make`` for rows at these slots that attend to the context."""
    query = bench.random(1, HEADS, len(slots), DIM)
    length = int(slots[-1]) + 1

    def make() -> Callable[[], Any]:
        backend = bench.backend(mask)
        plan = backend.plan_requests([slots], [length], bench.device)

        def run() -> Tensor:
            return backend.attend_requests(query, [bench.keys], [bench.values], plan, SPEC)

        with mock.patch.object(tiles, "SPLIT_ROWS", tile):
            run()  # the first run plans
        return run

    return make


def flops_of(slots: Tensor) -> float:
    """Return the operations of causal attention for rows at these slots."""
    return attention_flops(float((slots + 1).sum()))


def full_prefill(bench: Bench) -> Iterator[dict[str, Any]]:
    """Time causal attention over the whole context, for comparison."""
    slots = torch.arange(bench.length)
    query = bench.random(1, HEADS, bench.length, DIM)
    keys, values = (x[:, :, : bench.length] for x in (bench.keys, bench.values))

    def sdpa() -> Callable[[], Any]:
        return lambda: scaled_dot_product_attention(
            query, keys, values, is_causal=True, enable_gqa=True
        )

    yield bench.row("full prefill", "SDPA of torch", sdpa, flops_of(slots))
    for kernels in ("auto", "fa2"):
        make = with_kernels(kernels, attend(bench, slots))
        yield bench.row("full prefill", kernels, make, flops_of(slots))


def selected_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Time scattered rows and a prompt behind them, by form of the mask, kernels and tile."""
    n = bench.length
    for ratio in (0.05, 0.15, 0.30):
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(n, generator=generator)[: int(n * ratio)].sort().values
        slots = torch.cat((chosen, torch.arange(n, n + PROMPT)))
        for mask, kernels, tile in (
            ("positions", None, 128),
            ("split", None, 128),
            ("positions", "fa2", 128),
            ("positions", "fa2", 32),
            ("positions", "auto", 32),
            ("positions", None, 64),
            ("positions", None, 256),
        ):
            make = with_kernels(kernels, attend(bench, slots, mask, tile))
            how = f"{mask}, {kernels or 'as chosen'}, tiles of {tile}"
            yield bench.row(f"r = {ratio:.2f}", how, make, flops_of(slots))


def behind_a_prefix(bench: Bench) -> Iterator[dict[str, Any]]:
    """Time documents behind a prefix that is copied for each, or attended once and merged."""
    count = bench.length // DOCUMENT
    total = DOCUMENT * count
    for prefix in (16, 128, 512):
        tensors = (
            bench.random(1, HEADS, total, DIM),
            *(x[:, :, :total] for x in (bench.keys, bench.values)),
            *(bench.random(1, KV_HEADS, prefix, DIM) for _ in range(2)),
        )
        flops = attention_flops(total * (prefix + (DOCUMENT + 1) / 2))
        what = f"documents, prefix of {prefix}"
        yield bench.row(what, "prefix copied", copied(bench, tensors), flops)
        yield bench.row(what, "prefix attended once, merged", merged(bench, tensors), flops)


def copied(bench: Bench, tensors: tuple[Tensor, ...]) -> Make:
    """Return a ``make`` that copies the prefix in front of each document, as the backend does."""
    prefix = tensors[3].shape[2]

    def make() -> Callable[[], Any]:
        backend = bench.backend()
        lengths = (DOCUMENT,) * (bench.length // DOCUMENT)
        plan = backend.plan_documents(lengths, prefix, bench.device)
        return lambda: backend.attend_documents(*tensors, plan, SPEC)

    return make


def merged(bench: Bench, tensors: tuple[Tensor, ...]) -> Make:
    """Return a ``make`` that attends documents and prefix apart and merges by log-sum-exps."""
    q, k, v, prefix_k, prefix_v = (x[0].transpose(0, 1) for x in tensors)
    module = bench.backend()._module
    common: dict[str, Any] = {
        "num_qo_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim_qk": DIM,
        "sm_scale": SPEC.scaling,
        "q_data_type": q.dtype,
        "kv_data_type": q.dtype,
    }

    def planned(query_ends: list[int], key_ends: list[int], causal: bool) -> Any:
        room = torch.empty(256 * 2**20, dtype=torch.uint8, device=bench.device)
        wrapper = module.BatchPrefillWithRaggedKVCacheWrapper(room, kv_layout="NHD")
        ends = [torch.tensor(x, dtype=torch.int32) for x in (query_ends, key_ends)]
        wrapper.plan(qo_indptr=ends[0], kv_indptr=ends[1], causal=causal, **common)
        return wrapper

    def make() -> Callable[[], Any]:
        ends = list(range(0, len(q) + 1, DOCUMENT))
        own = planned(ends, ends, causal=True)
        shared = planned([0, len(q)], [0, len(prefix_k)], causal=False)

        def run() -> Tensor:
            first = own.run(q, k, v, return_lse=True)
            second = shared.run(q, prefix_k, prefix_v, return_lse=True)
            out: Tensor = module.merge_state(*first, *second)[0]
            return out

        return run

    return make


def few_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Time a decoding step, a prompt and a question over the context, by fa2 and fa3."""
    n = bench.length
    for what, slots in (
        ("one row, decoding", torch.tensor([n])),
        (f"a prompt of {PROMPT} rows", torch.arange(n, n + PROMPT)),
        ("512 adjacent rows", torch.arange(n - 512, n)),
    ):
        for kernels in ("fa2", "auto"):
            yield bench.row(
                what, kernels, with_kernels(kernels, attend(bench, slots)), flops_of(slots)
            )
    for kernels in ("fa2", "auto"):
        yield bench.row(
            f"{QUESTION} question rows",
            kernels,
            with_kernels(kernels, lambda: asked(bench)[0]),
            attention_flops(QUESTION * n),
        )
    for how, norm in (("Triton", attention_norm), ("blocked torch", blocked_attention_norm)):
        yield bench.row("attention norms", how, lambda norm=norm: norms(bench, norm))
        yield bench.row(
            "attention norms times values", how, lambda norm=norm: norms(bench, norm, weigh=True)
        )


def asked(bench: Bench) -> tuple[Callable[[], Any], Tensor, QueryPlan]:
    """Return a question's attention over the context as a function; also its query and plan."""
    backend = bench.backend()
    query = bench.random(1, HEADS, QUESTION, DIM)
    own = [bench.random(1, KV_HEADS, QUESTION, DIM) for _ in range(2)]
    context = [x[:, :, : bench.length] for x in (bench.keys, bench.values)]
    at = torch.arange(bench.length + QUESTION, device=bench.device)
    plan = backend.plan_queries([at[bench.length :]], [at[: bench.length]])

    def run() -> tuple[Tensor, Tensor]:
        return backend.attend_queries(query, *own, context[:1], context[1:], plan, SPEC)

    return run, query, plan.parts[0]


def norms(bench: Bench, norm: Callable[..., Tensor], *, weigh: bool = False) -> Callable[[], Any]:
    """Return the attention norms as a function; ``weigh`` multiplies by the values' norms."""
    run, query, plan = asked(bench)
    logsumexp = run()[1]
    keys, values = (x[:, :, : bench.length] for x in (bench.keys, bench.values))
    weights = values if weigh else None
    return lambda: norm(query, keys, logsumexp, plan, SPEC, reduction="l2", values=weights)


PARTS = (full_prefill, few_rows, selected_rows, behind_a_prefix)


def as_markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the table, below the machine and versions that it was measured with."""
    lines = [
        "# Kernels, masks and tiles on a GPU",
        "",
        "Made by `python benchmarks/gpu_kernels.py`: one layer, 32 query heads and 8 key heads of "
        "128, bfloat16, medians.",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        "",
        "| what | how | one layer | TFLOP/s |",
        "|:--|:--|--:|--:|",
    ]
    for row in rows:
        rate = f"{row['tflops']:.0f}" if row["tflops"] else "–"
        lines.append(f"| {row['what']} | {row['how']} | {row['layer_ms']:.3f} ms | {rate} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=32768, help="slots of the context")
    parser.add_argument("--repeats", type=int, default=10, help="runs that are counted")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_kernels.py needs a CUDA device, and torch sees none here.")
    bench = Bench(arguments.length, arguments.repeats, torch.device("cuda"))
    about = describe(arguments.repeats) | {"tokens": arguments.length}
    rows: list[dict[str, Any]] = []
    for part in PARTS:
        for row in part(bench):
            rows.append(row)
            RESULTS.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"about": about, "rows": rows}, indent=1)
            (RESULTS / "gpu_kernels.json").write_text(text + "\n")
            (RESULTS / "gpu_kernels.md").write_text(as_markdown(about, rows))
    print(as_markdown(about, rows))


if __name__ == "__main__":
    main()
