"""Questions per second in batches of 1, 2, 4 and 8, and one by one, on the demo's model.

    python benchmarks/batches.py [--dtype float32|bfloat16] [--repeats 5] [--context 1024]
                                 [--new 32] [--model FOLDER]

Each question has its own set of the corpus's passages, of about ``--context`` tokens together; the
sets overlap. Both ways do the same work on the same session: ``ask_many`` of B questions, and
``ask`` of the same questions one after another. "first token" is everything up to the first token's
logits; "answer" adds greedy decoding of exactly ``--new`` tokens. The ways are interleaved, and
speed-ups are medians of the ratios within a round, so that other programs slow both alike. Every
answer of a batch is compared with the answer to the same question alone.

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
from ifkv.store import MemoryStore
from ttft_report import about_machine

SIZES = (1, 2, 4, 8)
RATIO = 0.15
RESULTS = Path(__file__).parent / "results"


def questions_and_documents(
    session: ifkv.Session, count: int, context: int
) -> tuple[list[str], list[list[str]]]:
    """Return ``count`` questions, and for each the keys of its passages.

    Each question's passages begin further on in the corpus than those of the one before.
    """
    corpus = load_corpus()
    texts = [passage.text for passage in corpus.passages]
    rounds = 1
    while sum(len(session.format.document_ids(text)) for text in texts) < 2 * context:
        rounds += 1
        texts += [f"Edition {rounds}. {passage.text}" for passage in corpus.passages]
    keys = session.add(texts)
    lengths = [len(session.format.document_ids(text)) for text in texts]
    questions = [corpus.questions[i % len(corpus.questions)].text for i in range(count)]
    documents = []
    for index in range(count):
        own: list[str] = []
        room = context - len(session.prefix_ids)
        at = index * 3
        # Ragged on purpose: every second request is a third shorter.
        room = room if index % 2 == 0 else room * 2 // 3
        while room >= lengths[at % len(texts)] and len(own) < len(texts):
            own.append(keys[at % len(texts)])
            room -= lengths[at % len(texts)]
            at += 1
        documents.append(own or [keys[at % len(texts)]])
    return questions, documents


def seconds(run: Callable[[], object]) -> tuple[float, object]:
    """Run a function; return the seconds it takes, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def measure(
    session: ifkv.Session, size: int, context: int, new: int, repeats: int
) -> list[dict[str, object]]:
    """Measure one batch size, to the first token and to the whole answer."""
    questions, documents = questions_and_documents(session, size, context)
    rows: list[dict[str, object]] = []
    for what, tokens in (("first token", 1), ("answer", new)):
        how = {"ratio": RATIO, "max_new_tokens": tokens}

        def together(how: dict[str, object] = how) -> object:
            answers = session.ask_many(
                questions, documents=documents, batch_tokens=size * (context + 1024), **how
            )
            return [answer.token_ids.tolist() for answer in answers]

        def alone(how: dict[str, object] = how) -> object:
            each = zip(questions, documents, strict=True)
            if how["max_new_tokens"] == 1:  # without the forward that generate() repeats
                ready = [session.prepare(q, documents=own, ratio=RATIO) for q, own in each]
                return [[int(one.logits.argmax())] for one in ready]
            answers = [session.ask(q, documents=own, **how) for q, own in each]
            return [answer.token_ids.tolist() for answer in answers]

        pairs, same = [], 0
        for repeat in range(-1, repeats):  # the first round warms up and is not counted
            ways = [together, alone] if repeat % 2 else [alone, together]
            found = {way: seconds(way) for way in ways}
            if repeat >= 0:
                pairs.append((found[together][0], found[alone][0]))
            same = sum(a == b for a, b in zip(found[together][1], found[alone][1], strict=True))
        lengths = [len(session.context_ids(own)) for own in documents]
        rows.append(
            {
                "requests": size,
                "what": what,
                "contexts": lengths,
                "new_tokens": tokens,
                "together_seconds": statistics.median(pair[0] for pair in pairs),
                "alone_seconds": statistics.median(pair[1] for pair in pairs),
                "speedup": statistics.median(b / a for a, b in pairs),
                "same_answers": same,
            }
        )
    return rows


def load(dtype: torch.dtype, folder: str | None) -> tuple[object, object, str]:
    """Load the demo's model, or the one in a folder."""
    if folder is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder), Path(folder).name
    from ifkv.demo.model import load_demo_model

    return *load_demo_model(dtype=dtype), "SmolLM2-135M-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--model", help="folder of another model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model, tokenizer, name = load(getattr(torch, arguments.dtype), arguments.model)
    model.generation_config.eos_token_id = None  # both ways decode equally many tokens
    session = ifkv.Session(model, tokenizer, store=MemoryStore())
    rows = [
        row
        for size in SIZES
        for row in measure(session, size, arguments.context, arguments.new, arguments.repeats)
    ]
    about = about_machine() | {
        "model": name,
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "ratio": RATIO,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem = arguments.results / f"batches-cpu-{arguments.dtype}"
    stem.with_suffix(".json").write_text(
        json.dumps({"about": about, "rows": rows}, indent=1) + "\n"
    )
    lines = [
        f"# Questions in batches, {name}, {arguments.dtype}, {about['threads']} CPU threads",
        "",
        f"{about['date']}, torch {about['torch']}, transformers {about['transformers']}; contexts "
        f"of up to {arguments.context} tokens of different lengths, r = {RATIO}; medians of "
        f"{arguments.repeats} interleaved repeats. Made by `python benchmarks/batches.py`.",
        "",
        "| requests | to | together | per second | one by one | speed-up | same answers |",
        "|--:|:--|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['requests']} | {r['what']}, {r['new_tokens']} new | {r['together_seconds']:.2f} s "
        f"| {r['requests'] / r['together_seconds']:.2f} | {r['alone_seconds']:.2f} s "
        f"| {r['speedup']:.2f}× | {r['same_answers']} of {r['requests']} |"
        for r in rows
    ]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
