"""Time of a hot request and of full prefill, by step and by kind of operator.

    python benchmarks/milliseconds.py [--model smollm2] [--dtype float32] [--lengths 1024,4096,8192]
                                      [--ratio 0.15] [--repeats 5]

Each step is timed alone, without a profiler (medians), and then run once more under torch.profiler,
which says how long each kind of operator took, dispatch included. The rest of the time is Python
between the operators. The profiler's own cost is counted with the operators, so the share of Python
is underestimated if anything. Steps run one after another on the same cache, full prefill last.

Writes benchmarks/results/milliseconds-cpu-DTYPE.json and .md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import ifkv
from bench_models import MODELS, load
from ttft import Setting
from ttft_report import about_machine

RESULTS = Path(__file__).parent / "results"
# Kinds of operators, by prefixes of their names; the first match counts.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::"),
    "attention kernel": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "moving rows": ("aten::copy_", "aten::cat", "aten::index", "aten::gather", "aten::fill_"),
    "other operators": ("",),
}


def kind_of(operator: str) -> str:
    """Return the kind of an operator, by its name.

    >>> kind_of("aten::index_copy_"), kind_of("aten::silu")
    ('moving rows', 'other operators')
    """
    return next(kind for kind, names in KINDS.items() if operator.startswith(names))


def spent(run: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Measure a call: seconds by kind of operator, and the number of operators started."""
    run()
    walls = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        walls.append(time.perf_counter() - start)
    wall = statistics.median(walls)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    kinds = dict.fromkeys(KINDS, 0.0)
    calls = 0
    for event in seen.key_averages():
        if not event.key.startswith(("USDT", "ProfilerStep")):
            kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
            calls += event.count
    between = max(0.0, wall - sum(kinds.values()))
    return {"seconds": wall, "operators": calls, "kinds": kinds | {"between operators": between}}


def steps_of(setting: Setting, ratio: float) -> dict[str, Callable[[], Any]]:
    """Return the steps of a request on the patched model, as functions to run alone."""
    model, prompt = setting.model, setting.prompt
    cache = ifkv.stitch(model, setting.documents)
    slots = ifkv.select(cache, ifkv.score(model, cache, prompt), ratio=ratio)

    def repair() -> None:
        ifkv.recompute(model, cache, slots, prompt_ids=prompt)
        cache.crop()

    return {
        "stitch": lambda: ifkv.stitch(model, setting.documents),
        "score": lambda: ifkv.score(model, cache, prompt),
        "recompute, prompt": repair,
    }


def measure(setting: Setting, ratio: float, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each step and for full prefill."""
    rows = []
    with ifkv.patch(setting.model):
        for name, run in steps_of(setting, ratio).items():
            rows.append({"context": setting.context, "step": name} | spent(run, repeats))
    full = spent(setting.full, 1)  # long enough to need no median
    return [*rows, {"context": setting.context, "step": "full prefill"} | full]


def as_markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the results as a page."""
    names = list(rows[0]["kinds"])
    lines = [
        f"# Milliseconds by step and kind of operator, {about['model']}, {about['dtype']}",
        "",
        f"{about['date']}, {about['processor']}, {about['threads']} threads, torch "
        f"{about['torch']}, transformers {about['transformers']}; r = {about['ratio']:g}, medians "
        f"of {about['repeats']} calls. Made by `python benchmarks/milliseconds.py`; its "
        "docstring says what is measured. Milliseconds:",
        "",
        f"| context | step | all | {' | '.join(names)} | operators started |",
        f"|--:|:--|--:|{'--:|' * len(names)}--:|",
    ]
    for row in rows:
        parts = [f"{1e3 * row['kinds'][name]:.0f}" for name in names]
        lines.append(
            f"| {row['context']:,} | {row['step']} | {1e3 * row['seconds']:.0f} | "
            f"{' | '.join(parts)} | {row['operators']:,} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", choices=list(MODELS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--lengths", default="1024,4096,8192")
    parser.add_argument("--ratio", type=float, default=0.15)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    model, layout = load(given.model, getattr(torch, given.dtype))
    rows = []
    for length in map(int, given.lengths.split(",")):
        print(f"{length} tokens", file=sys.stderr)
        rows += measure(Setting(model, layout, length), given.ratio, given.repeats)
    about = about_machine() | {
        "model": MODELS[given.model],
        "dtype": given.dtype,
        "ratio": given.ratio,
        "repeats": given.repeats,
    }
    name = given.results / f"milliseconds-cpu-{given.dtype}"
    name.with_suffix(".json").write_text(
        json.dumps({"about": about, "rows": rows}, indent=1) + "\n"
    )
    text = as_markdown(about, rows)
    name.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
