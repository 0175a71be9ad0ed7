"""Tokens per second of encoding a corpus, against transformers' prefill of the same tokens.

    python benchmarks/encoding.py [--dtype float32|bfloat16] [--repeats 5] [--documents 24]
                                  [--model FOLDER]

The baseline is transformers' own forward of the decoder stack (no logits) with SDPA attention on
the unpatched model. It is the faster of two ways: each document alone, and padded batches of
documents of similar length. It computes the documents' tokens only. ``ifkv.prefill_documents``, at
several ``batch_tokens``, also lets them attend to a prefix that was encoded before. Tokens per
second count document tokens, never padding. The ways are interleaved, and shares are medians of the
ratios within a round. Peak memory is the largest resident size above the size before, sampled every
2 ms, each way in a separate process (Linux only).

Writes a JSON file and a Markdown table into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import ifkv
from ifkv.demo.corpus import load_corpus
from ifkv.session.prompt_format import PromptFormat
from peak_memory import in_own_process, peak_above
from ttft_report import about_machine

BUDGETS = (256, 1024, 4096)
PADDED_BATCH = 4
RESULTS = Path(__file__).parent / "results"


def load(dtype: torch.dtype, folder: str | None) -> tuple[object, object, str]:
    """Load the demo's model, or the one in a folder."""
    if folder is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder), Path(folder).name
    from ifkv.demo.model import load_demo_model

    return *load_demo_model(dtype=dtype), "SmolLM2-135M-Instruct"


def ways_of(model, layout: PromptFormat, count: int) -> tuple[dict[str, Callable[[], None]], int]:
    """Return every way by name, and the number of document tokens that each encodes."""
    passages = load_corpus().passages
    documents = [
        torch.tensor(layout.document_ids(f"{i}. {passages[i % len(passages)].text}"))
        for i in range(count)
    ]
    with ifkv.patch(model):
        prefix = ifkv.prefill_documents(model, documents[:1], prefix=layout.prefix_ids())[0].prefix

    @torch.no_grad()
    def alone() -> None:
        for ids in documents:
            model.base_model(ids[None], use_cache=True)

    @torch.no_grad()
    def padded() -> None:
        ordered = sorted(documents, key=len)
        for start in range(0, len(ordered), PADDED_BATCH):
            some = ordered[start : start + PADDED_BATCH]
            ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(one) for one in some], batch_first=True
            )
            model.base_model(ids, attention_mask=mask, use_cache=True)

    def ours(budget: int) -> Callable[[], None]:
        def run() -> None:
            with ifkv.patch(model):
                ifkv.prefill_documents(model, documents, prefix=prefix, batch_tokens=budget)

        return run

    ways = {"transformers, one by one": alone, "transformers, padded batches": padded}
    ways |= {f"ifkv, batch_tokens={budget}": ours(budget) for budget in BUDGETS}
    return ways, sum(map(len, documents))


def peak_of(name: str, dtype: str, folder: str | None, count: int, threads: int) -> int:
    """Return the peak bytes of one way, above the bytes before; runs in a separate process."""
    torch.set_num_threads(threads)
    model, tokenizer, _ = load(getattr(torch, dtype), folder)
    ways, _ = ways_of(model, PromptFormat(tokenizer), count)
    return peak_above(ways[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--model", help="folder of another model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model, tokenizer, name = load(getattr(torch, arguments.dtype), arguments.model)
    ways, tokens = ways_of(model, PromptFormat(tokenizer), arguments.documents)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(-1, arguments.repeats):  # the first round warms up and is not counted
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            if repeat >= 0:
                seconds[way].append(time.perf_counter() - start)
    plain = [min(pair) for pair in zip(*list(seconds.values())[:2], strict=True)]
    rows = []
    for way, times in seconds.items():
        given = (arguments.dtype, arguments.model, arguments.documents, torch.get_num_threads())
        peak = in_own_process(peak_of, way, *given)
        rows.append(
            {
                "way": way,
                "tokens_per_second": tokens / statistics.median(times),
                "share": statistics.median(p / t for p, t in zip(plain, times, strict=True)),
                "peak_bytes": peak,
            }
        )
    about = about_machine() | {
        "model": name,
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "documents": arguments.documents,
        "tokens": tokens,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem = arguments.results / f"encoding-cpu-{arguments.dtype}"
    text = json.dumps({"about": about, "rows": rows}, indent=1)
    stem.with_suffix(".json").write_text(text + "\n")
    lines = [
        f"# Encoding a corpus, {name}, {arguments.dtype}, {about['threads']} CPU threads",
        "",
        f"{about['date']}, {about['processor']}, torch {about['torch']}, "
        f"transformers {about['transformers']}; "
        f"{arguments.documents} documents of {tokens} tokens together; {arguments.repeats} "
        "interleaved repeats; the share is of the faster transformers way within a round. Peak "
        "memory is above the weights and contains the documents' rows. Made by "
        "`python benchmarks/encoding.py`.",
        "",
        "| way | tokens/s | share of transformers' prefill | peak memory |",
        "|:--|--:|--:|--:|",
    ]
    lines += [
        f"| {r['way']} | {r['tokens_per_second']:.0f} | {r['share']:.0%} "
        f"| {r['peak_bytes'] / 2**20:.0f} MiB |"
        for r in rows
    ]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
