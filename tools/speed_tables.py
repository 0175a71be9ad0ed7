"""Write measured speeds from benchmarks/results into README and docs; run it after measurements.

On a page each table is between `<!-- speed: NAME -->` and `<!-- /speed -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/explanations/speed.md", "docs/gpu.md")
BLOCK = re.compile(r"(<!-- speed: (\w+) -->\n).*?(\n<!-- /speed -->)", re.DOTALL)
Row = dict[str, Any]


def timed() -> list[Row]:
    """Return the rows of ttft.py that have times."""
    rows = json.loads((RESULTS / "ttft-cpu.json").read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if "speedup" in row]


def as_table(head: str, rows: list[list[str]], left: int) -> str:
    """Return a Markdown table; the first ``left`` columns are left-aligned, the others right."""
    names = [name.strip() for name in head.split("|")]
    marks = [":--" if place < left else "--:" for place in range(len(names))]
    lines = [names, marks, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| :--", "|:--").replace(
        "| --:", "|--:"
    ).replace(":-- |", ":--|").replace("--: |", "--:|")  # fmt: skip


def small_model() -> str:
    """Return a table of the demo's model in float32: every length and ratio."""
    rows = [
        [
            f"{row['context']:,}",
            f"{row['ratio']:.2f}",
            f"{row['full_seconds']:.2f} s",
            f"{row['ttft_seconds']:.2f} s",
            f"{row['speedup']:.2f}×",
            f"{row['bound']:.2f}×",
            f"{row['share_of_bound']:.0%}",
        ]
        for row in timed()
        if row["model"].startswith("SmolLM2") and row["dtype"] == "float32"
    ]
    head = "context | r | full prefill | ifkv | speed-up | bound S(r) | share of the bound"
    return as_table(head, rows, 0)


def steps() -> str:
    """Return a table of every model and dtype at r = 0.15: steps, dense mask, memory."""
    rows = []
    for row in timed():
        if row["ratio"] != 0.15:
            continue
        part = row["steps"]
        dense, peak = "–", "–"
        if "dense_seconds" in row:
            dense = f"{row['dense_seconds']:.2f} s, {row['dense_over_recompute']:.2f}×"
        if "peak_extra_bytes" in row:
            share = row["peak_extra_bytes"] / (row["weight_bytes"] + row["stitched_bytes"])
            peak = f"{row['peak_extra_bytes'] / 2**20:.0f} MiB, {share:.1%}"
        rows.append(
            [
                row["model"].split()[0].strip(","),
                row["dtype"],
                f"{row['context']:,}",
                f"{row['full_seconds']:.2f} s",
                f"{row['ttft_seconds']:.2f} s",
                f"{row['speedup']:.2f}×",
                f"{row['share_of_bound']:.0%}",
                f"{part['stitch']:.2f} s",
                f"{part.get('score', 0) + part['select']:.2f} s",
                f"{part['recompute']:.2f} s",
                dense,
                peak,
            ]
        )
    head = (
        "model | dtype | context | full prefill | ifkv | speed-up | of S(r) | stitch | "
        "select | recompute, prompt | dense mask | memory"
    )
    return as_table(head, rows, 2)


def encoding() -> str:
    """Return a table of the tokens encoded per second, in both dtypes."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        found = json.loads((RESULTS / f"encoding-cpu-{dtype}.json").read_text(encoding="utf-8"))
        rows += [
            [
                dtype,
                row["way"],
                f"{row['tokens_per_second']:.0f}",
                f"{row['share']:.0%}",
                f"{row['peak_bytes'] / 2**20:.0f} MiB",
            ]
            for row in found["rows"]
        ]
    return as_table("dtype | way | tokens/s | of transformers' prefill | peak memory", rows, 2)


def choosing() -> str:
    """Return a table of what each selector costs, in time and in operations."""
    found = json.loads((RESULTS / "choosing-cpu-float32.json").read_text(encoding="utf-8"))
    shares = ("choosing", "choosing_flops", "request", "request_flops")
    rows = [
        [f"{row['context']:,}", f"`{row['selector']}`", *(f"{row[name]:.1%}" for name in shares)]
        for row in found["rows"]
    ]
    head = "context | selector | selection, time | operations | whole request, time | operations"
    return as_table(head, rows, 2)


def milliseconds() -> str:
    """Return a table of each step's time by kind of operator."""
    found = json.loads((RESULTS / "milliseconds-cpu-float32.json").read_text(encoding="utf-8"))
    kinds = list(found["rows"][0]["kinds"])
    rows = [
        [
            f"{row['context']:,}",
            row["step"],
            f"{1e3 * row['seconds']:.0f} ms",
            *(f"{1e3 * row['kinds'][kind]:.0f}" for kind in kinds),
        ]
        for row in found["rows"]
    ]
    return as_table(f"context | step | all | {' | '.join(kinds)}", rows, 2)


def gpu_kernels() -> str:
    """Return a table of kernels, masks and tiles, for one layer."""
    found = json.loads((RESULTS / "gpu_kernels.json").read_text(encoding="utf-8"))["rows"]
    rows = [
        [
            row["what"],
            row["how"],
            f"{row['layer_ms']:.2f} ms",
            f"{row['tflops']:.0f}" if row["tflops"] else "–",
        ]
        for row in found
    ]
    return as_table("what | how | one layer | TFLOP/s", rows, 2)


def gpu_ttft() -> str:
    """Return a table of times to first token on a GPU: every shape, length and ratio."""
    found = json.loads((RESULTS / "gpu_ttft.json").read_text(encoding="utf-8"))["rows"]
    rows = [
        [
            row["model"],
            f"{row['length']:,}",
            f"{row['ratio']:.2f}",
            f"{1e3 * min(row['full_prefill_seconds'].values()):,.0f} ms",
            f"{1e3 * row['ttft_seconds']:,.0f} ms",
            f"{row['speedup']:.2f}×",
            f"{row['bound']:.2f}×",
            f"{row['share_of_bound']:.0%}",
            *(f"{1e3 * row['steps'][step]:,.0f} ms" for step in ("stitch", "select", "recompute")),
            f"{row['full_prefill_peak_gb']:.0f} / {row['peak_gb']:.0f} GB",
        ]
        for row in sorted(found, key=lambda row: (row["model"], row["length"], row["ratio"]))
    ]
    head = (
        "shape | tokens | r | full prefill | ifkv | speed-up | bound S(r) | share | stitch | "
        "select | recompute, prompt | peak memory"
    )
    return as_table(head, rows, 1)


TABLES: dict[str, Callable[[], str]] = {
    "gpu_kernels": gpu_kernels,
    "gpu_ttft": gpu_ttft,
    "small_model": small_model,
    "steps": steps,
    "encoding": encoding,
    "milliseconds": milliseconds,
    "choosing": choosing,
}


def filled(text: str) -> str:
    """Return a page with its tables filled from the results."""
    return BLOCK.sub(lambda found: found[1] + "\n" + TABLES[found[2]]() + "\n" + found[3], text)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(page)
