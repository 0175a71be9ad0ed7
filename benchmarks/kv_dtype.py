"""Error of answers over quantized (FP8) keys and values, beside bfloat16's, on the demo's model.

    python benchmarks/kv_dtype.py [--questions 6] [--passages 4] [--new 12] [--model FOLDER]

For every question of the demo's corpus, the passage that answers it and its neighbours are
stitched. The reference is float32 with a float32 cache at the same recompute ratio; it chooses the
slots and the greedy answer. The other three ways recompute the same slots and are given the same
answer. They are compared with the reference token by token: the Kullback-Leibler divergence of the
next token's distribution (nats), the relative error of the logits around their mean, and how often
the likeliest token is the same. The numbers say nothing about speed.

Writes a JSON file and a Markdown table into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import transformers
from torch import Tensor

import ifkv
from ifkv.demo.corpus import load_corpus
from ifkv.demo.model import load_demo_model
from ifkv.models.compat import cache_keyword
from ifkv.session.prompt_format import INSTRUCTION, PromptFormat
from ttft_report import about_machine

RATIOS = (0.0, 0.15, 1.0)
FLOAT8 = torch.float8_e4m3fn
# Name of the way, dtype of the model, dtype of the cache.
WAYS = (
    ("float32, FP8 cache", torch.float32, FLOAT8),
    ("bfloat16", torch.bfloat16, None),
    ("bfloat16, FP8 cache", torch.bfloat16, FLOAT8),
)
RESULTS = Path(__file__).parent / "results"


def load(dtype: torch.dtype, folder: str | None) -> tuple[object, object]:
    """Load the demo's model, or the one in a folder."""
    if folder is None:
        return load_demo_model(dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def answer_logits(
    model: object, cache: ifkv.StitchedCache, slots: Tensor, prompt: list[int], answer: Tensor
) -> Tensor:
    """Return the logits of each token of a given answer, float32 ``[tokens, vocabulary]``."""
    first = ifkv.recompute(model, cache, slots, prompt_ids=prompt)
    rows = [first[None]]
    for token in answer[:-1]:  # one by one, as in decoding
        rows.append(model(token[None, None], **cache_keyword(model, cache)).logits[0])
    return torch.cat(rows).float()


def compared(got: Tensor, want: Tensor) -> dict[str, float]:
    """Return the errors of logits, as means over the answer's tokens."""
    p, q = want.log_softmax(-1), got.log_softmax(-1)
    centred = want - want.mean(-1, keepdim=True)
    off = (got - got.mean(-1, keepdim=True)) - centred
    return {
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "logit_error": float((off.norm(dim=-1) / centred.norm(dim=-1)).mean()),
        "same_top": float((got.argmax(-1) == want.argmax(-1)).float().mean()),
    }


def measure(
    models: dict[torch.dtype, object],
    tokenizer: object,
    questions: int,
    passages: int,
    new: int,
    ratios: tuple[float, ...] = RATIOS,
) -> list[dict[str, object]]:
    """Return a row for each ratio and way, with means over the questions."""
    corpus, text = load_corpus(), PromptFormat(tokenizer, INSTRUCTION)
    found: dict[tuple[float, str], list[dict[str, float]]] = {}
    for question in corpus.questions[:questions]:
        # The answering passage is not first: there it would be exact.
        wanted = [
            (question.passage + shift) % len(corpus.passages) for shift in range(-1, passages - 1)
        ]
        ids = [text.document_ids(corpus.passages[index].text) for index in wanted]
        prompt = text.prompt_ids(question.text)
        documents = {
            dtype: ifkv.prefill_documents(model, ids, prefix=text.prefix_ids())
            for dtype, model in models.items()
        }
        for ratio in ratios:
            model = models[torch.float32]
            cache = ifkv.stitch(model, documents[torch.float32])
            scores = ifkv.score(model, cache, prompt)
            slots = ifkv.select(cache, scores, ratio=ratio) if ratio else torch.tensor([]).long()
            twin = cache.clone()
            ifkv.recompute(model, twin, slots, prompt_ids=prompt)
            how = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
            answer = ifkv.generate(model, twin, prompt, **how)[0, len(prompt) :]
            want = answer_logits(model, cache, slots, prompt, answer)
            for name, dtype, kv_dtype in WAYS:
                own = ifkv.stitch(models[dtype], documents[dtype], kv_dtype=kv_dtype)
                got = answer_logits(models[dtype], own, slots, prompt, answer)
                found.setdefault((ratio, name), []).append(compared(got, want))
    return [
        {
            "ratio": ratio,
            "way": name,
            "questions": len(each),
            **{key: statistics.mean(one[key] for one in each) for key in each[0]},
            "worst_kl": max(one["kl"] for one in each),
        }
        for (ratio, name), each in found.items()
    ]


def as_markdown(about: dict[str, object], rows: list[dict[str, object]]) -> str:
    """Return the table."""
    lines = [
        f"# Quantized keys and values (FP8), {about['model']}",
        "",
        f"{about['date']}, torch {about['torch']}, transformers {about['transformers']}; "
        f"{about['questions']} questions over {about['passages']} passages, answers of up to "
        f"{about['new']} tokens, against float32 with a float32 cache at the same ratio. Made by "
        "`python benchmarks/kv_dtype.py`.",
        "",
        "| r | way | KL, nats | worst question | logit error | same likeliest token |",
        "|--:|:--|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['ratio']:.2f} | {row['way']} | {row['kl']:.5f} | {row['worst_kl']:.5f} "
        f"| {100 * row['logit_error']:.2f} % | {100 * row['same_top']:.1f} % |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--passages", type=int, default=4)
    parser.add_argument("--new", type=int, default=12)
    parser.add_argument("--model", help="folder of another model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    loaded = {dtype: load(dtype, arguments.model) for dtype in (torch.float32, torch.bfloat16)}
    models = {dtype: pair[0] for dtype, pair in loaded.items()}
    for model in models.values():
        ifkv.patch(model)
    sizes = arguments.questions, arguments.passages, arguments.new
    rows = measure(models, loaded[torch.float32][1], *sizes)
    about = about_machine() | {
        "model": "SmolLM2-135M-Instruct" if arguments.model is None else Path(arguments.model).name,
        "questions": rows[0]["questions"],
        "passages": arguments.passages,
        "new": arguments.new,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem = arguments.results / "kv-dtype"
    stem.with_suffix(".json").write_text(
        json.dumps({"about": about, "rows": rows}, indent=1) + "\n"
    )
    stem.with_suffix(".md").write_text(as_markdown(about, rows))
    print(as_markdown(about, rows))


if __name__ == "__main__":
    main()
