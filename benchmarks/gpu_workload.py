"""Model shapes, contexts and clocks of the benchmarks that run on a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import torch

import ifkv
from gpu_ttft_report import STEPS
from ifkv.models.compat import cache_keyword
from ifkv.selectors import Request, Selector

DOCUMENT = 512
PREFIX = 16
PROMPT = 64
QUESTION = 48  # tokens of the prompt that are the question itself
NEW_TOKENS = 32

_COMMON = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        "LlamaConfig",
        _COMMON
        | {
            "num_hidden_layers": 32,
            "intermediate_size": 14336,
            "vocab_size": 128256,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "Qwen3-8B": (
        "Qwen3Config",
        _COMMON
        | {
            "num_hidden_layers": 36,
            "intermediate_size": 12288,
            "vocab_size": 151936,
            "rope_parameters": {
                "rope_type": "yarn",  # as Qwen recommends beyond 32k tokens
                "rope_theta": 1000000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
        },
    ),
}


class Clock:
    """Timer: CUDA events on a GPU, the CPU's clock elsewhere (for the tests)."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Return a mark for this moment."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: list[Any]) -> list[float]:
        """Return the seconds between consecutive marks."""
        pairs = itertools.pairwise(marks)
        if not self._cuda:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairs]


@dataclasses.dataclass
class Workload:
    """A context of random tokens, and the measurements made on it.

    Attributes:
        stitched: Stitched cache of the latest request.
    """

    model: Any
    length: int
    clock: Clock
    prompt: list[int] = dataclasses.field(init=False)
    prefix: list[int] = dataclasses.field(init=False)
    documents: list[list[int]] = dataclasses.field(init=False)
    stitched: Any = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.length)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        # The length includes the prompt and the answer.
        size = self.length - NEW_TOKENS
        ids = torch.randint(1, vocabulary, (size,), generator=generator).tolist()
        self.prefix, rest, self.prompt = ids[:PREFIX], ids[PREFIX:-PROMPT], ids[-PROMPT:]
        self.documents = [rest[at : at + DOCUMENT] for at in range(0, len(rest), DOCUMENT)]

    @property
    def context(self) -> int:
        """Return the number of tokens of prefix and documents."""
        return len(self.prefix) + sum(map(len, self.documents))

    @torch.no_grad()
    def full_prefill(self) -> tuple[float, Any]:
        """Run transformers' own prefill of everything; return its seconds and its cache.

        Logits are computed for the last row only.
        """
        tokens = itertools.chain(self.prefix, *self.documents, self.prompt)
        ids = torch.tensor([list(tokens)]).to(self.model.device)
        marks = [self.clock.mark()]
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        marks.append(self.clock.mark())
        cache = out.cache if hasattr(out, "cache") else out.past_key_values
        return self.clock.seconds(marks)[0], cache

    @torch.no_grad()
    def request(self, caches: list[Any], ratio: float, rule: Selector) -> dict[str, Any]:
        """Stitch, select, recompute with the prompt; return seconds by step, and the selection."""
        self.stitched = None  # free the previous request's memory
        marks = [self.clock.mark()]
        self.stitched = cache = ifkv.stitch(self.model, caches)
        marks.append(self.clock.mark())
        asked = Request(self.prompt, self.prompt[:QUESTION], caches)
        selection = rule.select(self.model, cache, asked, ratio)
        marks.append(self.clock.mark())
        ifkv.recompute(self.model, cache, selection.slots, prompt_ids=self.prompt)
        marks.append(self.clock.mark())
        steps = dict(zip(STEPS, self.clock.seconds(marks), strict=True))
        return {"steps": steps, "selection": selection}

    @torch.no_grad()
    def decode(self, cache: Any) -> float:
        """Return the tokens decoded per second behind a cache; the first quarter is not counted."""
        token = torch.tensor([self.prompt[:1]]).to(self.model.device)
        how = cache_keyword(self.model, cache)
        counted = NEW_TOKENS - NEW_TOKENS // 4
        for step in range(NEW_TOKENS):
            if step == NEW_TOKENS - counted:
                marks = [self.clock.mark()]
            self.model(token, use_cache=True, **how)
        marks.append(self.clock.mark())
        return counted / self.clock.seconds(marks)[0]
