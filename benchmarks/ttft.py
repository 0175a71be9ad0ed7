"""Time to first token of a hot request against full prefill, on the demo's real model.

    python benchmarks/ttft.py [--dtype float32|bfloat16] [--repeats 7]

Both sides run the same token ids on the same model object's weights with the same threads. The
baseline is transformers' own forward with SDPA attention on an unpatched model, asked for the last
row's logits only. Ours is everything from the question's arrival: stitch, score, select, and the
fused forward of selected rows and prompt; documents lie in memory. Repeats of all ways are
interleaved and medians are compared, so that a noisy neighbour hits all alike.

Writes a JSON file and a Markdown table into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers

import ifkv
from ifkv.cost import ModelShape, mean_position, speedup_bound
from ifkv.demo.corpus import load_corpus
from ifkv.demo.model import load_demo_model
from ifkv.scoring import default_layers
from ifkv.text import PromptFormat

LENGTHS = (1024, 2048, 4096)
RATIOS = (0.05, 0.15, 0.30)
RESULTS = Path(__file__).parent / "results"


def documents_of_length(layout: PromptFormat, length: int) -> list[list[int]]:
    """Real passages whose tokens, with the prefix, add up to ``length``; the last one is cut."""
    texts = [passage.text for passage in load_corpus().passages]
    documents: list[list[int]] = []
    room = length - len(layout.prefix_ids())
    round_number = 0
    while room > 0:
        # The corpus is shorter than 4k tokens: begin again, with a heading that says so.
        heading = f"Edition {round_number + 1}. " if round_number else ""
        for text in texts:
            ids = layout.document_ids(heading + text)[:room]
            documents.append(ids)
            room -= len(ids)
            if room <= 0:
                break
        round_number += 1
    return documents


def measure(model, layout: PromptFormat, length: int, repeats: int) -> list[dict[str, object]]:
    """One context length: full prefill and every ratio, interleaved."""
    documents = documents_of_length(layout, length)
    prompt = layout.prompt_ids(load_corpus().questions[0].text)
    prefix = layout.prefix_ids()
    full_ids = torch.tensor([list(itertools.chain(prefix, *documents, prompt))])
    shape = ModelShape.of(model)
    depth = default_layers(shape.num_layers)[-1] + 1

    with ifkv.patch(model):
        caches = ifkv.prefill_documents(model, documents, prefix=prefix)

    @torch.no_grad()
    def full() -> torch.Tensor:
        return model(full_ids, use_cache=True, logits_to_keep=1).logits[0, -1]

    def ours(ratio: float) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
        marks = [time.perf_counter()]
        cache = ifkv.stitch(model, caches)
        marks.append(time.perf_counter())
        scores = ifkv.score(model, cache, prompt)
        marks.append(time.perf_counter())
        slots = ifkv.select(cache, scores, ratio=ratio)
        marks.append(time.perf_counter())
        logits = ifkv.recompute(model, cache, slots, prompt_ids=prompt)
        marks.append(time.perf_counter())
        names = ("stitch", "score", "select", "recompute")
        steps = {n: b - a for n, a, b in zip(names, marks, marks[1:], strict=False)}
        return steps, slots, logits

    truth = full()
    baseline: list[float] = []
    runs: dict[float, list[dict[str, float]]] = {ratio: [] for ratio in RATIOS}
    seen: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}
    for repeat in range(-1, repeats):  # the first round warms up and is not counted
        start = time.perf_counter()
        full()
        seconds = time.perf_counter() - start
        with ifkv.patch(model):
            for ratio in RATIOS:
                steps, slots, logits = ours(ratio)
                seen[ratio] = (slots, logits)
                if repeat >= 0:
                    runs[ratio].append(steps)
        if repeat >= 0:
            baseline.append(seconds)

    rows: list[dict[str, object]] = []
    full_seconds = statistics.median(baseline)
    for ratio in RATIOS:
        slots, logits = seen[ratio]
        context = len(full_ids[0]) - len(prompt)
        totals = [sum(steps.values()) for steps in runs[ratio]]
        # Paired within a round: what a neighbour does to one side it mostly does to the other.
        speedup = statistics.median(f / t for f, t in zip(baseline, totals, strict=True))
        bound = speedup_bound(
            shape,
            context_length=context,
            query_length=len(prompt),
            ratio=len(slots) / context,
            scoring_layers=depth,
            position=mean_position(slots, context),
        )
        kl = torch.nn.functional.kl_div(
            logits.double().log_softmax(-1),
            truth.double().log_softmax(-1),
            log_target=True,
            reduction="sum",
        )
        rows.append(
            {
                "context": context,
                "prompt": len(prompt),
                "ratio": ratio,
                "rows": len(slots),
                "mean_position": mean_position(slots, context),
                "full_seconds": full_seconds,
                "ttft_seconds": statistics.median(totals),
                "steps": {
                    name: statistics.median(steps[name] for steps in runs[ratio])
                    for name in runs[ratio][0]
                },
                "speedup": speedup,
                "bound": bound,
                "share_of_bound": speedup / bound,
                "kl_first_token": float(kl),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    model, tokenizer = load_demo_model(dtype=getattr(torch, arguments.dtype))
    layout = PromptFormat(tokenizer)
    rows = [row for length in LENGTHS for row in measure(model, layout, length, arguments.repeats)]
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "model": "SmolLM2-135M-Instruct",
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "repeats": arguments.repeats,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ifkv": ifkv.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    name = f"ttft-cpu-{arguments.dtype}"
    text = json.dumps({"about": about, "rows": rows}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    lines = [
        f"# Hot TTFT, {about['model']}, {arguments.dtype}, {about['threads']} CPU threads",
        "",
        f"{about['date']}, torch {about['torch']}, transformers {about['transformers']}; medians "
        f"of {arguments.repeats} interleaved repeats; speed-ups are medians of the ratios within "
        "a round. Made by `python benchmarks/ttft.py`.",
        "",
        "| context | r | full prefill | ifkv TTFT | speed-up | bound S(r) | share of bound |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['context']} | {r['ratio']:.2f} | {r['full_seconds']:.2f} s "
        f"| {r['ttft_seconds']:.2f} s | {r['speedup']:.2f}× | {r['bound']:.2f}× "
        f"| {r['share_of_bound']:.0%} |"
        for r in rows
    ]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
