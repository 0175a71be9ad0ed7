"""Time to first token on a CUDA GPU against full prefill, with random weights in real shapes.

    python benchmarks/gpu_ttft.py [--minutes 9] [--lengths 8192,32768,131072] [--repeats 5]
                                  [--selector sink-aware]

Models have the shapes of Llama-3.1-8B and Qwen3-8B, in bfloat16. Their weights are random: speed
does not depend on them, and answers are meaningless. The baseline is the faster of two full
prefills by transformers on the unpatched model, one with SDPA and one with FlashInfer attention.
The time of ifkv begins when the question arrives. It contains stitching, selection with its
scoring, and the fused forward of selected rows and prompt; the documents are in GPU memory.
Selection is also measured without CUDA graphs. Times are taken between CUDA events, so they include
waiting for the CPU. They are medians of the repeats; a first repeat is not counted.

Settings run in order of importance, and none begins after the minutes given. FlashInfer compiles
kernels that are new to this machine in the uncounted repeat. Writes gpu_ttft.json and gpu_ttft.md
into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import ifkv
from gpu_ttft_report import STEPS, with_shares, write
from gpu_workload import MODELS, Clock, Workload
from ifkv.cost import ModelShape, mean_position, speedup_bound
from ifkv.selectors import DEFAULT_SELECTOR, Selector, resolve

RESULTS = Path(__file__).parent / "results"
LENGTHS = (32768, 8192, 131072)  # first the one with a target
RATIOS = (0.15, 0.05, 0.30)


def register_flashinfer_attention(module: Any) -> str:
    """Register FlashInfer's causal prefill with transformers, for the second baseline.

    Returns:
        The name to give to `set_attn_implementation`.
    """
    from transformers import AttentionInterface

    wrappers: dict[Any, Any] = {}

    def attention(
        layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        shape = (len(q), len(k), q.shape[1], k.shape[1], q.shape[2], kwargs["scaling"])
        if shape not in wrappers:
            wrappers.clear()
            workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=q.device)
            wrapper = module.BatchPrefillWithRaggedKVCacheWrapper(workspace, kv_layout="NHD")
            wrapper.plan(
                qo_indptr=torch.tensor([0, len(q)], dtype=torch.int32),
                kv_indptr=torch.tensor([0, len(k)], dtype=torch.int32),
                num_qo_heads=q.shape[1],
                num_kv_heads=k.shape[1],
                head_dim_qk=q.shape[2],
                causal=True,
                sm_scale=kwargs["scaling"],
                q_data_type=q.dtype,
                kv_data_type=k.dtype,
            )
            wrappers[shape] = wrapper
        return wrappers[shape].run(q, k, v)[None], None

    # No mask function is registered with it, so transformers builds no mask. The name must not
    # contain "flash": transformers would take it for one of its own.
    AttentionInterface.register("bench_ragged", attention)
    return "bench_ragged"


def peak_memory(device: torch.device) -> float | None:
    """Return the peak gigabytes since the last call; None without a GPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def after_first(run: Callable[[], Any], repeats: int) -> list[Any]:
    """Return the results of all runs but the first."""
    run()
    return [run() for _ in range(repeats)]


def measure(
    model: Any,
    backend: Any,
    name: str,
    length: int,
    repeats: int,
    rule: Selector,
    out_of_time: Callable[[], bool],
) -> Iterator[dict[str, Any]]:
    """Measure the baselines and every ratio of one model and length; yield a record per ratio."""
    device = model.device
    work = Workload(model, length, Clock(device))
    peak_memory(device)
    baselines, decoding = {}, {}
    before = model.config._attn_implementation
    for label, attention in (
        ("sdpa", "sdpa"),
        ("flashinfer", register_flashinfer_attention(backend._module)),
    ):
        model.set_attn_implementation(attention)
        seconds = after_first(lambda: work.full_prefill()[0], repeats)
        baselines[label] = statistics.median(seconds)
    model.set_attn_implementation(before)
    full_memory = peak_memory(device)
    decoding["full prefill"] = work.decode(work.full_prefill()[1])
    shape = ModelShape.of(model)
    with ifkv.patch(model, backend=backend) as handle:
        caches = ifkv.prefill_documents(model, work.documents, prefix=work.prefix)
        if out_of_time():
            return
        # Selection takes the same time at every ratio: measure it once without CUDA graphs.
        graphs, handle.captures = handle.captures, None
        runs = after_first(lambda: work.request(caches, RATIOS[0], rule), repeats)
        launched = statistics.median(run["steps"]["select"] for run in runs)
        handle.captures = graphs
        peak_memory(device)
        for ratio in RATIOS:
            if out_of_time():
                return
            runs = after_first(lambda r=ratio: work.request(caches, r, rule), repeats)
            peak = peak_memory(device)
            selection = runs[-1]["selection"]
            if "ifkv" not in decoding:
                decoding["ifkv"] = work.decode(work.stitched)
            slots = selection.slots.cpu()
            yield record(name, work, ratio, baselines, runs) | {
                "selector": str(rule),
                "rows": len(slots),
                "select_launched_seconds": launched,
                "bound": speedup_bound(
                    shape,
                    context_length=work.context,
                    query_length=len(work.prompt),
                    ratio=len(slots) / work.context,
                    position=mean_position(slots, work.context),
                    selection_flops=selection.cost.flops,
                ),
                "full_prefill_peak_gb": full_memory,
                "peak_gb": peak,
                "decode_tokens_per_second": dict(decoding),
            }


def record(
    name: str, work: Workload, ratio: float, baselines: dict[str, float], runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the medians of one setting."""
    return {
        "model": name,
        "length": work.length,
        "context": work.context,
        "prompt": len(work.prompt),
        "ratio": ratio,
        "full_prefill_seconds": baselines,
        "ttft_seconds": statistics.median(sum(run["steps"].values()) for run in runs),
        "steps": {step: statistics.median(run["steps"][step] for run in runs) for step in STEPS},
    }


def describe(repeats: int) -> dict[str, Any]:
    """Return the GPU, the driver and the versions."""
    import flashinfer

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.splitlines()[0] if driver else "unknown",
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "flashinfer": flashinfer.__version__,
        "ifkv": ifkv.__version__,
        "python": platform.python_version(),
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--selector", default=DEFAULT_SELECTOR)
    parser.add_argument("--mask", default="positions", choices=("positions", "split"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "gpu_ttft.py needs a CUDA device, and torch sees none here. "
            "benchmarks/ttft.py measures on the CPU."
        )
    rule = resolve(arguments.selector)
    deadline = time.monotonic() + 60 * arguments.minutes

    def out_of_time() -> bool:
        return time.monotonic() > deadline

    from ifkv.backends.flashinfer import FlashInferBackend

    backend = FlashInferBackend(mask=arguments.mask)
    about = describe(arguments.repeats) | {"mask": arguments.mask}
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for name in arguments.models.split(","):
        kind, sizes = MODELS[name]
        config = getattr(transformers, kind)(**sizes)
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.eval()
        for length in map(int, arguments.lengths.split(",")):
            if out_of_time():
                skipped.append(f"{name} at {length}")
                continue
            repeats = arguments.repeats if length <= 32768 else 1
            try:
                for row in measure(model, backend, name, length, repeats, rule, out_of_time):
                    rows += with_shares([row])
                    write(RESULTS, about, rows)  # keep what has been measured
            except torch.cuda.OutOfMemoryError as error:
                skipped.append(f"{name} at {length} ({error})")
            torch.cuda.empty_cache()
        del model
        torch.cuda.empty_cache()
    if skipped:
        about["left out (no time or memory)"] = ", ".join(skipped)
    print(write(RESULTS, about, rows))


if __name__ == "__main__":
    main()
