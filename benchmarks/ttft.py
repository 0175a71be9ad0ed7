"""Time to first token of a hot request against full prefill and against a dense mask.

    python benchmarks/ttft.py [--models smollm2,qwen3] [--dtypes float32,bfloat16]
                              [--lengths 1024,2048,4096,8192] [--ratios 0.05,0.15,0.30]
                              [--dense-ratios 0.15] [--selector sink-aware]
                              [--repeats 5] [--minutes 60] [--only times|peaks]

All ways run the same token ids on the same weights with the same threads. The baseline is
transformers' own forward with SDPA attention on the unpatched model; it computes logits for the
last row only. The time of ifkv begins when the question arrives. It contains stitching, selection,
and the fused forward of selected rows and prompt; the documents are in memory. The dense mask
(dense_mask.py) recomputes the same rows and the prompt over the same stitched cache. Its stitching
and selection are not counted, so it is compared with ifkv's recompute alone.

A round times all ways one after another, so that other programs slow all of them alike; medians
are compared. ``--minutes`` ends a setting (model, dtype, length) early, after a whole round. Each
peak is measured in a separate process: the largest resident memory above weights and documents,
less the stitched cache itself.

A run may measure a part of the settings. Its results are merged into
benchmarks/results/ttft-cpu.json, which has a row per model, dtype, length and ratio, and
ttft-cpu.md is written from all rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ifkv
from bench_models import MODELS, context_of, load
from dense_mask import OverwritingCache, recompute_densely
from ifkv.cost import ModelShape, mean_position, speedup_bound
from ifkv.demo.corpus import load_corpus
from ifkv.selectors import DEFAULT_SELECTOR, Request, Selection, Selector, resolve
from peak_memory import in_own_process, peak_above
from ttft_report import about_machine, show

RESULTS = Path(__file__).parent / "results"
STEPS = ("stitch", "select", "recompute")


class Setting:
    """Model, dtype and context length to measure, with the documents in memory."""

    def __init__(self, model: Any, layout: Any, length: int):
        self.model = model
        prefix = layout.prefix_ids()
        documents, self.prompt = context_of(model, layout, length)
        self.question = list(layout.encode(load_corpus().questions[0].text))
        joined = list(itertools.chain(prefix, *documents))
        self.context = len(joined)
        self.context_ids = torch.tensor(joined)
        with ifkv.patch(model):
            self.documents = ifkv.prefill_documents(model, documents, prefix=prefix)

    @torch.no_grad()
    def full(self) -> Tensor:
        """Run a full prefill; return the logits of the last row."""
        ids = torch.cat((self.context_ids, torch.tensor(self.prompt)))[None]
        return self.model(ids, use_cache=True, logits_to_keep=1).logits[0, -1]

    def request(self, ratio: float, rule: Selector) -> tuple[dict[str, float], Selection, Tensor]:
        """Answer by ifkv on the patched model; return seconds by step, selection, last logits."""
        # Outside a benchmark a model is patched, and its weights identified, before any request.
        ifkv.stitch(self.model, self.documents[:1])
        marks = [time.perf_counter()]
        cache = ifkv.stitch(self.model, self.documents)
        marks.append(time.perf_counter())
        asked = Request(self.prompt, self.question, self.documents)
        selection = rule.select(self.model, cache, asked, ratio)
        marks.append(time.perf_counter())
        logits = ifkv.recompute(self.model, cache, selection.slots, prompt_ids=self.prompt)
        marks.append(time.perf_counter())
        steps = dict(zip(STEPS, map(float.__sub__, marks[1:], marks), strict=False))
        return steps, selection, logits

    def dense(self, slots: Tensor) -> tuple[float, Tensor]:
        """Recompute with a dense mask, on the unpatched model; return seconds and logits."""
        with ifkv.patch(self.model):
            cache = OverwritingCache(
                ifkv.stitch(self.model, self.documents), slots, len(self.prompt)
            )
        start = time.perf_counter()
        logits = recompute_densely(self.model, cache, self.context_ids, self.prompt)
        return time.perf_counter() - start, logits


@dataclasses.dataclass
class Times:
    """Seconds of every round, by ratio, and the last round's selections and logits."""

    full: list[float] = dataclasses.field(default_factory=list)
    steps: dict[float, list[dict[str, float]]] = dataclasses.field(default_factory=dict)
    dense: dict[float, list[float]] = dataclasses.field(default_factory=dict)
    found: dict[float, tuple[Selection, Tensor]] = dataclasses.field(default_factory=dict)


def time_rounds(
    setting: Setting,
    ratios: list[float],
    dense_ratios: list[float],
    repeats: int,
    seconds: float,
    rule: Selector,
    tell: Callable[[str], None],
) -> tuple[Times, Tensor]:
    """Run up to ``repeats`` interleaved rounds; begin none that would end after ``seconds``."""
    times, begun = Times(), time.perf_counter()
    # Not counted: warm up memory and threads with the shortest of the ways.
    with ifkv.patch(setting.model):
        setting.request(min(ratios), rule)
    round_seconds = 0.0
    for number in range(repeats):
        start = time.perf_counter()
        if number and start + round_seconds > begun + seconds:
            break
        tell(f"round {number + 1} of {repeats}: full prefill")
        truth = setting.full()
        times.full.append(time.perf_counter() - start)
        for ratio in ratios:
            tell(f"round {number + 1} of {repeats}: r = {ratio:g}")
            with ifkv.patch(setting.model):
                steps, selection, logits = setting.request(ratio, rule)
            times.steps.setdefault(ratio, []).append(steps)
            times.found[ratio] = selection, logits
            if ratio in dense_ratios:
                tell(f"round {number + 1} of {repeats}: dense mask at r = {ratio:g}")
                spent, dense_logits = setting.dense(selection.slots)
                times.dense.setdefault(ratio, []).append(spent)
                # The order of summation differs, and so does rounding; a larger error is a bug.
                error = float((dense_logits - logits).abs().max() / logits.abs().max())
                if not error < (1e-3 if logits.dtype == torch.float32 else 0.25):
                    raise RuntimeError(f"the dense mask's logits differ by {error:.1e}.")
        round_seconds = max(round_seconds, time.perf_counter() - start)
    return times, truth


def rows_of(setting: Setting, times: Times, truth: Tensor, rule: Selector) -> list[dict[str, Any]]:
    """Return a row of results for every ratio."""
    shape = ModelShape.of(setting.model)
    rows = []
    for ratio, runs in times.steps.items():
        selection, logits = times.found[ratio]
        slots = selection.slots
        totals = [sum(steps.values()) for steps in runs]
        # Paired within a round: other programs mostly slow both sides of a pair alike.
        speedup = statistics.median(f / t for f, t in zip(times.full, totals, strict=True))
        bound = speedup_bound(
            shape,
            context_length=setting.context,
            query_length=len(setting.prompt),
            ratio=len(slots) / setting.context,
            position=mean_position(slots, setting.context),
            selection_flops=selection.cost.flops,
        )
        likely, true = (x.double().log_softmax(-1) for x in (logits, truth))
        row: dict[str, Any] = {
            "context": setting.context,
            "prompt": len(setting.prompt),
            "ratio": ratio,
            "selector": str(rule),
            "rows": len(slots),
            "mean_position": mean_position(slots, setting.context),
            "repeats": len(totals),
            "full_seconds": statistics.median(times.full),
            "ttft_seconds": statistics.median(totals),
            "steps": {name: statistics.median(steps[name] for steps in runs) for name in STEPS},
            "speedup": speedup,
            "bound": bound,
            "share_of_bound": speedup / bound,
            "kl_first_token": float((true.exp() * (true - likely)).sum()),
        }
        if ratio in times.dense:
            row["dense_seconds"] = statistics.median(times.dense[ratio])
            row["dense_over_recompute"] = statistics.median(
                dense / steps["recompute"]
                for dense, steps in zip(times.dense[ratio], runs, strict=True)
            )
        rows.append(row)
    return rows


def peak_of(
    model_name: str, dtype: str, length: int, ratio: float, selector: str, threads: int
) -> dict[str, Any]:
    """Measure the peak bytes of one request, and the bytes it is compared with.

    Runs in a separate process.
    """
    torch.set_num_threads(threads)
    model, layout = load(model_name, getattr(torch, dtype))
    setting, rule = Setting(model, layout, length), resolve(selector)
    asked = Request(setting.prompt, setting.question, setting.documents)
    kept: list[Any] = []
    with ifkv.patch(model):
        # Warm up: threads, their scratch memory and lazily loaded code are no part of a request.
        Setting(model, layout, 256).request(ratio, rule)

        def request() -> None:
            cache = ifkv.stitch(model, setting.documents)
            slots = rule.select(model, cache, asked, ratio).slots
            ifkv.recompute(model, cache, slots, prompt_ids=setting.prompt)
            kept.append(cache)

        peak = peak_above(request)
    stitched = sum(
        buffer.nbytes
        for layer in kept[0].layers
        for buffer in (layer.key_buffer, layer.value_buffer)
    )
    return {
        "context": setting.context,
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
        "stitched_bytes": stitched,
        "peak_extra_bytes": max(0, peak - stitched),
    }


def numbers(kind: type) -> Callable[[str], list[Any]]:
    """Return a parser of comma-separated numbers."""
    return lambda text: [kind(part) for part in text.split(",") if part.strip()]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=numbers(str), default=["smollm2", "qwen3"])
    parser.add_argument("--dtypes", type=numbers(str), default=["float32", "bfloat16"])
    parser.add_argument("--lengths", type=numbers(int), default=[1024, 2048, 4096, 8192])
    parser.add_argument("--ratios", type=numbers(float), default=[0.05, 0.15, 0.30])
    parser.add_argument("--dense-ratios", type=numbers(float), default=[0.15])
    parser.add_argument("--selector", default=DEFAULT_SELECTOR)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--minutes", type=float, default=60, help="at most, for each model, dtype and length"
    )
    parser.add_argument("--only", choices=("times", "peaks"), help="measure only one of the two")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    for name, known in (("models", MODELS), ("dtypes", ("float32", "bfloat16"))):
        if unknown := set(getattr(given, name)) - set(known):
            parser.error(f"--{name}: {', '.join(unknown)} unknown; choose from {', '.join(known)}")
    if not given.ratios or not all(0 < ratio <= 1 for ratio in given.ratios):
        parser.error("--ratios: give numbers above 0 and up to 1")
    if given.repeats < 1:
        parser.error("--repeats: give at least 1")
    return given


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    rule = resolve(given.selector)
    with show(given.results / "ttft-cpu") as report:
        for model_name, dtype in itertools.product(given.models, given.dtypes):
            what = {"model": MODELS[model_name], "dtype": dtype}
            if given.only != "peaks":
                model, layout = load(model_name, getattr(torch, dtype))
                for length in given.lengths:
                    name = f"{what['model']}, {dtype}, {length}"
                    report.tell(f"{name}: documents")
                    setting = Setting(model, layout, length)
                    times, truth = time_rounds(
                        setting,
                        given.ratios,
                        given.dense_ratios,
                        given.repeats,
                        60 * given.minutes,
                        rule,
                        lambda text, name=name: report.tell(f"{name}: {text}"),
                    )
                    about = about_machine()
                    report.add([what | row | about for row in rows_of(setting, times, truth, rule)])
                del model
            if given.only != "times":
                for length, ratio in itertools.product(given.lengths, given.ratios):
                    report.tell(f"{what['model']}, {dtype}, {length}: memory at r = {ratio:g}")
                    threads = torch.get_num_threads()
                    asked = model_name, dtype, length, ratio, str(rule), threads
                    peak = in_own_process(peak_of, *asked)
                    report.add([what | {"ratio": ratio} | peak])


if __name__ == "__main__":
    main()
