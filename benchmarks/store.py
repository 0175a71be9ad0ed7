"""The document store: bandwidth against plain files, and time to first token hot, warm and cold.

    python benchmarks/store.py [--repeats 7] [--tokens 2048] [--skip-model]

Bandwidth: documents of the demo model's shape are put and got. For comparison, the same number of
bytes is written to a plain file (``os.write`` and fsync) and read from one (``readinto`` into fresh
memory). Files are in the page cache when they are read. Ways are interleaved; medians are compared.

Time to first token: from the question's arrival to the first token's logits. It is measured at
ratio 0.15, and at ratio 0, where there is least computation to hide the loading. Documents are in
memory (hot), in the page cache (warm), or on the disk and dropped from the page cache (cold). They
are loaded whole before stitching, or layer by layer during the computation. Checksums have been
verified on an earlier use, except in the row "checked".

Quantized storage (8 bits): the error of the rows and of the first token's distribution.

Writes benchmarks/results/store.json and store.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import ifkv
from ifkv.store import DiskStore
from ifkv.testing import random_document

RATIOS = (0.15, 0.0)
RESULTS = Path(__file__).parent / "results"


def interleaved(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each way; a round runs all, and the first is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            kept = way()
            took = time.perf_counter() - start
            del kept
            if round_number:
                seconds[name].append(took)
    return {name: statistics.median(each) for name, each in seconds.items()}


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bandwidth(folder: Path, length: int, repeats: int) -> dict[str, float]:
    """Return the GB/s of puts and gets, and of plain writes and reads of the same bytes."""
    shape = {"length": length, "layers": 30, "kv_heads": 3, "head_dim": 64}
    document = random_document(0, **shape)
    stores = {
        verify: DiskStore(folder / verify, verify=verify) for verify in ("first", "always", "never")
    }
    keys = {name: store.put(document) for name, store in stores.items()}
    size = stores["first"].stats().nbytes
    file_of_store = stores["first"].folder.file_of(keys["first"])  # the same file for all reads
    plain, data = folder / "plain", np.random.default_rng(0).bytes(size)
    numbers = itertools.count()

    def write_plainly() -> None:
        # A new file each time, as for a put. The last one is read.
        if plain.exists():
            plain.rename(folder / f"plain-{next(numbers)}")
        descriptor = os.open(plain, os.O_WRONLY | os.O_CREAT)
        rest = memoryview(data)
        while rest.nbytes:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
        os.close(descriptor)

    def read_plainly() -> object:
        buffer = np.empty(size, dtype=np.uint8)
        with file_of_store.open("rb", buffering=0) as file:
            file.readinto(memoryview(buffer))
        return buffer

    fresh = iter([random_document(seed, **shape) for seed in range(1, repeats + 2)])

    def put() -> None:
        store = stores["first"]
        written.append(store.put(next(fresh)))

    written: list[str] = []
    write_plainly()
    seconds = interleaved({"plain write": write_plainly, "put": put}, repeats)
    for key in written:
        stores["first"].delete(key)
    reads: dict[str, Callable[[], Any]] = {
        "plain read": read_plainly,
        "get": lambda: stores["first"].get(keys["first"]).prefix,
        "get, always checked": lambda: stores["always"].get(keys["always"]).prefix,
        "get, never checked": lambda: stores["never"].get(keys["never"]).prefix,
        "lazy open": lambda: stores["first"].get(keys["first"], lazy=True),
    }
    seconds |= interleaved(reads, 3 * repeats)
    result = {name: size / took / 1e9 for name, took in seconds.items() if name != "lazy open"}
    return result | {"lazy open, ms": 1e3 * seconds["lazy open"], "bytes": float(size)}


def requests(
    model: Any, layout: Any, tokens: int, folder: Path, repeats: int
) -> tuple[dict[float, dict[str, dict[str, float]]], dict[str, dict[str, float]]]:
    """Return times to first token by ratio, state and way, and errors of 8-bit storage."""
    from ifkv.demo.corpus import load_corpus

    corpus = load_corpus()
    texts = [passage.text for passage in corpus.passages]
    documents: list[list[int]] = []
    while sum(map(len, documents)) < tokens:
        documents.append(
            layout.document_ids(f"{len(documents)}. {texts[len(documents) % len(texts)]}")
        )
    prompt, prefix = layout.prompt_ids(corpus.questions[0].text), layout.prefix_ids()
    made = ifkv.prefill_documents(model, documents, prefix=prefix)
    context = len(prefix) + sum(map(len, documents))
    loads: dict[tuple[float, str, str], list[float]] = {}

    def answer(read: Callable[[], list[Any]], state: str, ratio: float) -> torch.Tensor:
        start = time.perf_counter()
        found = read()
        loaded = time.perf_counter() - start
        cache = ifkv.stitch(model, found)
        slots = torch.zeros(0, dtype=torch.long)
        if ratio > 0:
            slots = ifkv.select(cache, ifkv.score(model, cache, prompt), ratio=ratio)
        logits = ifkv.recompute(model, cache, slots, prompt_ids=prompt)
        total = time.perf_counter() - start
        if cache.loader is not None:
            loaded += cache.loader.wait_seconds
        loads.setdefault((ratio, state, "load"), []).append(loaded)
        loads.setdefault((ratio, state, "total"), []).append(total)
        assert logits is not None
        return logits

    stores = {
        name: DiskStore(folder / f"{name}-requests", codec=name)
        for name in ("exact", "fp8", "int8")
    }
    keys = [stores["exact"].put(document) for document in made]
    exact = stores["exact"]
    truth = answer(lambda: made, "warm-up", RATIOS[0]).float().log_softmax(-1)
    for _, ratio in itertools.product(range(repeats + 1), RATIOS):
        answer(lambda: made, "hot", ratio)
        answer(lambda: [exact.get(key) for key in keys], "warm, whole", ratio)
        answer(lambda: [exact.get(key, lazy=True) for key in keys], "warm, by layer", ratio)
        forget(exact.path)
        answer(lambda: [exact.get(key) for key in keys], "cold, whole", ratio)
        forget(exact.path)
        answer(lambda: [exact.get(key, lazy=True) for key in keys], "cold, by layer", ratio)
        forget(exact.path)
        strict = DiskStore(exact.path)  # has verified nothing yet
        answer(
            lambda store=strict: [store.get(key, lazy=True) for key in keys],
            "cold, by layer, checked",
            ratio,
        )
        strict.close()
    tables: dict[float, dict[str, dict[str, float]]] = {ratio: {} for ratio in RATIOS}
    for (ratio, state, what), each in loads.items():
        if state != "warm-up":
            row = tables[ratio].setdefault(state, {})
            row[what] = statistics.median(each[1:])
            row[f"best {what}"] = min(each[1:])
    for table in tables.values():
        table["context"] = {"tokens": float(context), "nbytes": float(exact.stats().nbytes)}

    errors: dict[str, dict[str, float]] = {}
    for codec in ("fp8", "int8"):
        store = stores[codec]
        again = [store.get(store.put(document)) for document in made]
        errors[codec] = {
            f"{part} relative L2": max(
                float((getattr(a, part) - getattr(b, part)).norm() / getattr(b, part).norm())
                for a, b in zip(again, made, strict=True)
            )
            for part in ("keys", "values")
        }
        logits = answer(lambda again=again: again, codec, RATIOS[0]).float().log_softmax(-1)
        errors[codec]["KL of the first token"] = float((truth.exp() * (truth - logits)).sum())
        errors[codec]["share of exact size"] = store.stats().nbytes / exact.stats().nbytes
    return tables, errors


def to_markdown(result: dict[str, Any]) -> str:
    """Return the results as tables."""
    lines = ["# Document store", "", f"{result['machine']}. Medians.", ""]
    if result["load"] > 0.5:
        lines += [
            f"**Other programs ran during this measurement** (load average {result['load']:.1f} at "
            "the start). Reads were interleaved and can be compared. Writes wait for a shared disk "
            "and vary several-fold from run to run. Differences of less than about 10 % between "
            "times to first token mean nothing.",
            "",
        ]
    speed = result["bandwidth"]
    lines += [
        f"One document of {speed['bytes'] / 2**20:.0f} MiB, float32, in the page cache.",
        "",
        "| | GB/s | share of plain file |",
        "|---|---|---|",
    ]
    for name, plain in (
        ("plain write", "plain write"),
        ("put", "plain write"),
        ("plain read", "plain read"),
        ("get", "plain read"),
        ("get, always checked", "plain read"),
        ("get, never checked", "plain read"),
    ):
        lines.append(f"| {name} | {speed[name]:.2f} | {speed[name] / speed[plain]:.0%} |")
    lines += ["", f"A lazy open takes {speed['lazy open, ms']:.2f} ms.", ""]
    for threads, ratio, table in (
        (threads, ratio, table)
        for threads, tables in result.get("ttft", {}).items()
        for ratio, table in tables.items()
    ):
        context = table["context"]
        lines += [
            f"Time to first token, {result['model']}, {threads} computing threads, "
            f"{context['tokens']:.0f} tokens of context, {context['nbytes'] / 2**20:.0f} MiB "
            f"stored, ratio {ratio:g}.",
            "",
            "| | ms | of which waiting for the load | over hot | fastest, ms |",
            "|---|---|---|---|---|",
        ]
        hot = table["hot"]["total"]
        for name, row in table.items():
            if name != "context":
                lines.append(
                    f"| {name} | {1e3 * row['total']:.0f} | {row['load'] / row['total']:.0%} | "
                    f"{row['total'] / hot:.2f}× | {1e3 * row['best total']:.0f} |"
                )
        lines.append("")
    if "codecs" in result:
        lines += ["Quantized storage (8 bits).", ""]
        lines += ["| codec | keys, relative L2 | values | KL of the first token, nats | size |"]
        lines += ["|---|---|---|---|---|"]
        for codec, row in result["codecs"].items():
            lines.append(
                f"| {codec} | {row['keys relative L2']:.4f} | {row['values relative L2']:.4f} | "
                f"{row['KL of the first token']:.5f} | {row['share of exact size']:.0%} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--skip-model", action="store_true", help="measure only the bandwidth")
    parser.add_argument(
        "--folder", type=Path, help="folder on the disk to measure; a temporary one without"
    )
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of computing threads")
    options = parser.parse_args()
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, ifkv {ifkv.__version__}"
    )
    result: dict[str, Any] = {"machine": machine, "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        result["bandwidth"] = bandwidth(folder, options.tokens, options.repeats)
        if not options.skip_model:
            from ifkv.demo.model import MODEL_NAME, load_demo_model
            from ifkv.session.prompt_format import PromptFormat

            model, tokenizer = load_demo_model()
            result["model"] = MODEL_NAME
            with ifkv.patch(model):
                result["ttft"] = {}
                for threads in options.threads or [torch.get_num_threads()]:
                    torch.set_num_threads(threads)
                    result["ttft"][threads], result["codecs"] = requests(
                        model,
                        PromptFormat(tokenizer),
                        options.tokens,
                        folder / str(threads),
                        options.repeats,
                    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "store.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "store.md").write_text(to_markdown(result))
    print(to_markdown(result))


if __name__ == "__main__":
    main()
