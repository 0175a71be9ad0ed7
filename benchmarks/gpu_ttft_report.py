"""Results file and table of gpu_ttft.py, with speed-ups and shares of the bound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STEPS = ("stitch", "select", "recompute")
TARGET = 0.85  # of S(r), at 32k tokens


def with_shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add each record's speed-up over the faster baseline, and its share of the bound S(r)."""
    done = []
    for row in rows:
        speedup = min(row["full_prefill_seconds"].values()) / row["ttft_seconds"]
        done.append(row | {"speedup": speedup, "share_of_bound": speedup / row["bound"]})
    return done


def as_markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the table, below the machine and versions that it was measured with."""
    lines = [
        "# Time to first token on a GPU",
        "",
        "Made by `python benchmarks/gpu_ttft.py`: random weights in real shapes, bfloat16, medians "
        f"of {about['repeats']} repeats after one that is not counted.",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        "",
        "Select, in parentheses: without CUDA graphs, each kernel launched separately.",
        "",
        "| model | tokens | r | full prefill (SDPA / FlashInfer) | stitch | select (launched) "
        "| recompute + prompt | TTFT | speed-up | S(r) | share | peak memory (full prefill / ifkv) "
        "| decoding (transformers / ifkv) |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        steps = [f"{row['steps'][step] * 1e3:.1f} ms" for step in STEPS]
        steps[1] += f" ({row['select_launched_seconds'] * 1e3:.1f})"
        decode = row["decode_tokens_per_second"]
        full = row["full_prefill_seconds"]
        peaks = [row["full_prefill_peak_gb"], row["peak_gb"]]
        peak = "–" if None in peaks else "{:.1f} / {:.1f} GB".format(*peaks)
        lines.append(
            f"| {row['model']} | {row['length']} | {row['ratio']:.2f} "
            f"| {full['sdpa'] * 1e3:.0f} / {full['flashinfer'] * 1e3:.0f} ms "
            f"| {' | '.join(steps)} | {row['ttft_seconds'] * 1e3:.0f} ms "
            f"| {row['speedup']:.2f}× | {row['bound']:.2f}× | {row['share_of_bound']:.0%} "
            f"| {peak} | {decode['full prefill']:.0f} / {decode['ifkv']:.0f} tokens/s |"
        )
    judged = [row for row in rows if row["length"] == 32768]
    if judged:
        reached = sum(row["share_of_bound"] >= TARGET for row in judged)
        lines += [
            "",
            f"Target: at least {TARGET:.0%} of S(r) at 32768 tokens; reached in {reached} of "
            f"{len(judged)} settings.",
        ]
    return "\n".join(lines) + "\n"


def write(folder: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Write both files and return the table."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"about": about, "rows": rows}, indent=1)
    (folder / "gpu_ttft.json").write_text(text + "\n")
    table = as_markdown(about, rows)
    (folder / "gpu_ttft.md").write_text(table)
    return table
