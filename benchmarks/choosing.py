"""Cost of selection: each selector's seconds, beside the operations that it reports.

    python benchmarks/choosing.py [--model smollm2] [--dtype float32] [--lengths 1024,4096]
                                  [--selectors ...] [--ratio 0.15] [--repeats 7]

Every selector selects from the same stitched cache for the same question, and the request is then
finished (recompute with the prompt). A round times all selectors and a full prefill (transformers'
own forward with SDPA, logits of the last row only) one after another. Medians are reported as
shares of full prefill: seconds of its seconds, and operations of its operations. Stitching is left
out, since it is the same for all.

Writes a JSON file and a Markdown table into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import ifkv
from bench_models import MODELS, load
from ifkv.cost import ModelShape, prefill_cost, recompute_cost
from ifkv.selectors import resolve
from ttft import Setting
from ttft_report import about_machine

SELECTORS = (
    "attention-norm",
    "sink-aware",
    "sensitivity-aware",
    "sensitivity-aware:layers=0.2-0.7",
    "prophetkv",
    "deviation-aware",
    "cacheblend",
    "epic",
)
RESULTS = Path(__file__).parent / "results"
HEAD = ("context", "selector", "selection, time", "operations", "whole request, time", "operations")


def measure(
    model: Any, layout: Any, lengths: Sequence[int], names: Sequence[str], ratio: float, rounds: int
) -> list[dict[str, Any]]:
    """Return a row per context and selector: medians of seconds, and operations."""
    shape, rows = ModelShape.of(model), list[dict[str, Any]]()
    for length in lengths:
        setting = Setting(model, layout, length)
        prompt, context = len(setting.prompt), setting.context
        full: list[float] = []
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        operations: dict[str, tuple[float, float]] = {}
        for number in track(range(-1, rounds), description=f"{context} tokens"):
            start = time.perf_counter()
            setting.full()
            full.append(time.perf_counter() - start)
            for name in names:
                with ifkv.patch(model):
                    steps, chosen, _ = setting.request(ratio, resolve(name))
                seconds[name].append((steps["select"], steps["select"] + steps["recompute"]))
                rest = recompute_cost(shape, chosen.slots.cpu(), context, prompt)
                operations[name] = chosen.cost.flops, chosen.cost.flops + rest.flops
            if number < 0:  # the first round warms up memory and threads
                full.clear()
                for each in seconds.values():
                    each.clear()
        whole, flops = statistics.median(full), prefill_cost(shape, context + prompt).flops
        for name in names:
            choosing, request_seconds = map(statistics.median, zip(*seconds[name], strict=True))
            rows.append(
                {
                    "context": context,
                    "selector": name,
                    "choosing": choosing / whole,
                    "choosing_flops": operations[name][0] / flops,
                    "request": request_seconds / whole,
                    "request_flops": operations[name][1] / flops,
                    "full_seconds": whole,
                }
            )
    return rows


def markdown(found: dict[str, Any]) -> str:
    """Return the results as a page."""
    about = found["about"]
    lines = [
        f"# Cost of selection ({found['model']}, {found['dtype']}, r = {found['ratio']:g})",
        "",
        f"As shares of full prefill's time and operations. Medians over "
        f"{found['rounds']} interleaved rounds. {about['processor']}, {about['threads']} threads, "
        f"torch {about['torch']}, transformers {about['transformers']}, {about['date']}. "
        "By `python benchmarks/choosing.py`.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|--:|:--|--:|--:|--:|--:|",
    ]
    for row in found["rows"]:
        shares = (row[key] for key in ("choosing", "choosing_flops", "request", "request_flops"))
        cells = [str(row["context"]), f"`{row['selector']}`", *(f"{each:.1%}" for each in shares)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", choices=list(MODELS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lengths", default="1024,4096")
    parser.add_argument("--selectors", nargs="+", default=SELECTORS)
    parser.add_argument("--ratio", type=float, default=0.15)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    model, layout = load(given.model, getattr(torch, given.dtype))
    lengths = [int(each) for each in given.lengths.split(",")]
    rows = measure(model, layout, lengths, given.selectors, given.ratio, given.repeats)
    found = {
        "about": about_machine(),
        "model": MODELS[given.model],
        "dtype": given.dtype,
        "ratio": given.ratio,
        "rounds": given.repeats,
        "rows": rows,
    }
    name = f"choosing-cpu-{given.dtype}"
    (given.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (given.out / f"{name}.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
