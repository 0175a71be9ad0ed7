"""Time to the first token of a conversation's turns, on the demo's model.

    python benchmarks/turns.py [--dtype float32|bfloat16] [--repeats 5] [--context 2048]
                               [--added 512] [--model FOLDER]

A conversation over documents of about ``--context`` tokens has had its first turn. Two kinds of
second turn are measured: one without new documents, and one with documents of about ``--added``
tokens. Each is measured three ways, interleaved: in the conversation; as a single question over the
same documents (``Session.prepare``, which does not know the first turn); and by transformers alone,
which keeps its own cache of the whole history and runs all new tokens over it. Times are medians.

Writes a JSON file and a Markdown table into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import ifkv
from batches import load, seconds
from ifkv.demo.corpus import load_corpus
from ifkv.models.compat import cache_keyword
from ifkv.store import MemoryStore
from ttft_report import about_machine

RATIO = 0.15
RESULTS = Path(__file__).parent / "results"
QUESTIONS = [question.text for question in load_corpus().questions]


def passages(session: ifkv.Session, tokens: int, edition: str) -> list[str]:
    """Add passages of the corpus of about ``tokens`` tokens together; return their keys.

    A heading with ``edition`` tells them apart from other copies.
    """
    texts, length, number = [], 0, 0
    while length < tokens:
        number += 1
        for passage in load_corpus().passages:
            texts.append(f"Edition {edition}{number}. {passage.text}")
            length += len(session.format.document_ids(texts[-1]))
            if length >= tokens:
                break
    return session.add(texts)


def plain_turn(model: Any, ids: torch.Tensor, kept: int) -> Callable[[], object]:
    """Return a function that runs the tokens behind the first ``kept`` by transformers alone.

    Its cache holds the first ``kept`` tokens.
    """
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(ids[None, :kept], logits_to_keep=1, **cache_keyword(model, cache))

    @torch.no_grad()
    def run() -> object:
        logits = model(ids[None, kept:], logits_to_keep=1, **cache_keyword(model, cache)).logits
        return int(logits[0, -1].argmax())

    def restored() -> object:
        token = run()
        cache.crop(kept - len(ids))
        return token

    return restored


def measure(session: ifkv.Session, context: int, added: int, repeats: int) -> list[dict[str, Any]]:
    """Measure the two kinds of second turn, each on fresh conversations."""
    first, more = passages(session, context, "A"), passages(session, added, "B")
    rows = []
    for what, further in (("no new documents", []), ("with new documents", more)):
        found: dict[str, list[float]] = {"conversation": [], "by itself": [], "plain": []}
        plain: Callable[[], object] | None = None
        for repeat in range(-1, repeats):  # the first round warms up and is not counted
            chat = session.conversation(first)
            chat.ask(QUESTIONS[0], ratio=RATIO, max_new_tokens=16)
            kept = len(chat.token_ids) - len(chat._pending)
            if further:
                chat.add(further)
            answer = chat.ask(QUESTIONS[1], ratio=RATIO, max_new_tokens=1)
            alone, _ = seconds(
                lambda own=[*first, *further]: session.prepare(
                    QUESTIONS[1], documents=own, ratio=RATIO
                )
            )
            ids = torch.cat((answer.context_ids, answer.prompt_ids))
            plain = plain or plain_turn(session.model, ids, kept)
            spent, _ = seconds(plain)
            if repeat >= 0:
                found["conversation"].append(answer.ttft_seconds)
                found["by itself"].append(alone)
                found["plain"].append(spent)
        rows.append(
            {
                "turn": what,
                "kept": kept,
                "new": len(ids) - kept,
                "recomputed": len(answer.slots),
                "bound": answer.speedup_bound,
                "seconds": {way: statistics.median(times) for way, times in found.items()},
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--added", type=int, default=512)
    parser.add_argument("--model", help="folder of another model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model, tokenizer, name = load(getattr(torch, arguments.dtype), arguments.model)
    session = ifkv.Session(model, tokenizer, store=MemoryStore())
    rows = measure(session, arguments.context, arguments.added, arguments.repeats)
    about = about_machine() | {
        "model": name,
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "ratio": RATIO,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem = arguments.results / f"turns-cpu-{arguments.dtype}"
    stem.with_suffix(".json").write_text(
        json.dumps({"about": about, "rows": rows}, indent=1) + "\n"
    )
    lines = [
        f"# Turns of a conversation, {name}, {arguments.dtype}, {about['threads']} CPU threads",
        "",
        f"{about['date']}, torch {about['torch']}, transformers {about['transformers']}; time to "
        f"the first token of a second turn, r = {RATIO}; medians of {arguments.repeats} "
        "interleaved repeats. Made by `python benchmarks/turns.py`.",
        "",
        "| second turn | tokens kept | tokens new | recomputed | in the conversation "
        "| single question | transformers, cache kept | speed-up over it | bound |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        own, alone, plain = (row["seconds"][way] for way in ("conversation", "by itself", "plain"))
        lines.append(
            f"| {row['turn']} | {row['kept']} | {row['new']} | {row['recomputed']} "
            f"| {own * 1e3:.0f} ms | {alone * 1e3:.0f} ms | {plain * 1e3:.0f} ms "
            f"| {plain / own:.2f}× | {row['bound']:.2f}× |"
        )
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
