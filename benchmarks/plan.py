"""Predicted against measured times to first token, on a small real model.

    python benchmarks/plan.py [--lengths 1024,2048,4096] [--ratios 0.05,0.15,0.30] [--repeats 3]

The machine is calibrated, and a plan is made for every context length and ratio. Then the same
requests are measured as in benchmarks/ttft.py: full prefill by transformers' own forward on the
unpatched model, and ifkv with the documents in memory. A round times all ways one after another;
medians are compared.

Writes plan-cpu-DTYPE.json and .md into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import ifkv
from bench_models import load
from ifkv.planning import Planner, planner_for
from ifkv.selectors import DEFAULT_SELECTOR, resolve
from ttft import Setting
from ttft_report import about_machine

RESULTS = Path(__file__).parent / "results"
GOAL = 0.20


def measure(
    setting: Setting, planner: Planner, ratios: list[float], repeats: int
) -> list[dict[str, Any]]:
    """Return the predicted times and the medians of the measured ones for one context length."""
    rule = resolve(DEFAULT_SELECTOR)
    plan = planner.plan(
        setting.context,
        documents=len(setting.documents),
        prompt=len(setting.prompt),
        question=len(setting.question),
        ratios=ratios,
    )
    full: list[float] = []
    runs: dict[float, list[dict[str, float]]] = {ratio: [] for ratio in ratios}
    with ifkv.patch(setting.model):
        setting.request(min(ratios), rule)  # not counted: warms up memory and threads
    for _ in range(repeats):
        start = time.perf_counter()
        setting.full()
        full.append(time.perf_counter() - start)
        with ifkv.patch(setting.model):
            for ratio in ratios:
                runs[ratio].append(setting.request(ratio, rule)[0])

    rows = [("full prefill", None, plan.prefill, full)]
    for forecast in plan.forecasts:
        steps = runs[forecast.ratio]
        rows += [
            ("stitch", forecast.ratio, forecast.stitch, [s["stitch"] for s in steps]),
            ("select", forecast.ratio, forecast.select, [s["select"] for s in steps]),
            (
                "recompute + prompt",
                forecast.ratio,
                forecast.recompute,
                [s["recompute"] for s in steps],
            ),
            ("TTFT, hot", forecast.ratio, forecast.hot, [sum(s.values()) for s in steps]),
        ]
    return [
        {
            "context": setting.context,
            "ratio": ratio,
            "step": step,
            "predicted": predicted,
            "measured": statistics.median(times),
        }
        for step, ratio, predicted, times in rows
    ]


def table(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the results as a page."""
    whole = [row for row in rows if row["step"] in ("full prefill", "TTFT, hot")]
    within = sum(abs(row["predicted"] / row["measured"] - 1) <= GOAL for row in whole)
    lines = [
        f"# Predicted against measured, {about['model']}, {about['dtype']}",
        "",
        f"{about['date']}, {about['processor']}, {about['threads']} threads, torch "
        f"{about['torch']}, transformers {about['transformers']}. Calibrated in "
        f"{about['calibration_seconds']:.0f} s; medians of {about['repeats']} interleaved rounds. "
        "Made by `python benchmarks/plan.py`.",
        "",
        f"{within} of {len(whole)} whole times (full prefill, and TTFT with documents in memory) "
        f"were predicted within {GOAL:.0%}. The steps of each TTFT follow it.",
        "",
        "| context | r | | predicted | measured | predicted / measured |",
        "|--:|--:|---|--:|--:|--:|",
    ]
    order = {"TTFT, hot": 0, "stitch": 1, "select": 2, "recompute + prompt": 3}
    for row in sorted(rows, key=lambda r: (r["context"], r["ratio"] or 0, order.get(r["step"], 0))):
        quotient = row["predicted"] / row["measured"]
        beyond = row in whole and abs(quotient - 1) > GOAL
        lines.append(
            f"| {row['context']:,} | {'' if row['ratio'] is None else format(row['ratio'], '.2f')} "
            f"| {row['step']} | {row['predicted']:.3f} s | {row['measured']:.3f} s "
            f"| {f'**{quotient:.2f}**' if beyond else f'{quotient:.2f}'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1024,2048,4096")
    parser.add_argument("--ratios", default="0.05,0.15,0.30")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    ratios = [float(ratio) for ratio in arguments.ratios.split(",")]
    model, layout = load("smollm2", getattr(torch, arguments.dtype))
    started = time.perf_counter()
    planner = planner_for(model, recalibrate=True)
    calibration = time.perf_counter() - started
    rows = []
    print(f"calibrated in {calibration:.1f} s", file=sys.stderr)
    for length in map(int, arguments.lengths.split(",")):
        print(f"{length} tokens", file=sys.stderr)
        rows += measure(Setting(model, layout, length), planner, ratios, arguments.repeats)
    about = about_machine() | {
        "model": "SmolLM2-135M-Instruct",
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "calibration_seconds": calibration,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    name = arguments.results / f"plan-cpu-{arguments.dtype}"
    name.with_suffix(".json").write_text(
        json.dumps({"about": about, "rates": planner.rates.to_json(), "rows": rows}, indent=1)
        + "\n"
    )
    text = table(about, rows)
    name.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
