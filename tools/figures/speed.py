"""Figures of measured speed-ups beside the bound S(r), from benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from figures.canvas import Canvas

HEIGHT, BAR, GAP = 180, 30, 16


def draw_all(results: Path) -> dict[str, str]:
    """Draw a figure for each model and dtype; return them by file name.

    Args:
        results: JSON file that benchmarks/ttft.py wrote.
    """
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "speedup" in row:  # the others have only memory
            groups.setdefault((row["model"], row["dtype"]), []).append(row)
    return {
        f"{results.stem}-{slug(model)}-{dtype}.svg": draw(own)
        for (model, dtype), own in groups.items()
    }


def slug(model: str) -> str:
    """Return a model's name up to the first blank, as part of a file's name.

    >>> slug("Qwen3-0.6B shape, random weights")
    'qwen3-0.6b'
    """
    return model.split()[0].strip(",").lower()


def draw(rows: list[dict[str, Any]]) -> str:
    """Draw one panel per context length: a bar per recompute ratio, a line at its bound.

    Args:
        rows: Results of one model and dtype.
    """
    about = rows[-1]
    contexts = sorted({row["context"] for row in rows})
    per_panel = max(sum(row["context"] == context for row in rows) for context in contexts)
    wide = per_panel * (BAR + GAP) + 36
    canvas = Canvas(
        60 + len(contexts) * wide,
        HEIGHT + 156,
        f"Speed-up over full prefill by recompute ratio at {contexts} tokens of context, each bar "
        "beside the bound S(r).",
    )
    scale = HEIGHT / (1.06 * max(max(row["bound"], row["speedup"]) for row in rows))
    base = 66 + HEIGHT
    where = about.get("device") or f"{about['threads']} CPU threads"
    canvas.text(20, 26, "Speed-up of time to first token over full prefill", bold=True, size=15)
    canvas.text(20, 46, f"{about['model']}, {about['dtype']}, {where}", size=12, fill="soft")
    top = max(max(row["bound"], row["speedup"]) for row in rows)
    for value in range(0, int(top) + 1, 4):
        y = base - value * scale
        canvas.line(48, y, 48 + len(contexts) * wide, y)
        canvas.text(42, y + 4, f"{value}×", size=12, anchor="end", fill="soft")
    for panel, context in enumerate(contexts):
        x = 62 + panel * wide
        canvas.text(x, base + 42, f"{context:,} tokens", size=13, bold=True)
        for row in sorted((r for r in rows if r["context"] == context), key=lambda r: r["ratio"]):
            height = row["speedup"] * scale
            canvas.rect(x, base - height, BAR, height, "new")
            canvas.line(
                x - 4, base - row["bound"] * scale, x + BAR + 4, base - row["bound"] * scale,
                stroke="ink", width=2.5,
            )  # fmt: skip
            canvas.text(x + BAR / 2, base - 6, f"{row['speedup']:.1f}", size=12, anchor="middle")
            canvas.text(
                x + BAR / 2, base + 18, f"r={row['ratio']:g}", size=11, anchor="middle", fill="soft"
            )
            x += BAR + GAP
    canvas.rect(48, base + 54, 14, 12, "new")
    canvas.text(68, base + 64, "measured", size=12)
    canvas.line(148, base + 60, 176, base + 60, stroke="ink", width=2.5)
    canvas.text(184, base + 64, "bound S(r), from counting operations", size=12)
    return canvas.render()
