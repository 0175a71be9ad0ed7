"""From prepared questions to their answers: decoding, and what it leaves behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.cache.checks import check_cache
from ifkv.generation.decode import decode
from ifkv.generation.finish_reason import FinishReason, finish_reason
from ifkv.generation.generate import run_generate
from ifkv.generation.greedy import GreedySettings, greedy_settings
from ifkv.generation.streaming import text_streamer
from ifkv.session.answer import Answer, Prepared

if TYPE_CHECKING:
    from ifkv.generation.settings import GenerationSettings
    from ifkv.session.engine import Engine

Stream = bool | Callable[[str], None]

# An answer is tokens, whatever a generation config wants beside them.
TOKENS_ONLY = {
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}


def complete(
    engine: Engine,
    ready: Sequence[Prepared],
    settings: GenerationSettings,
    *,
    streams: Sequence[Stream] | None = None,
    seeds: Sequence[int | None] | None = None,
    keep: bool = False,
) -> list[Answer]:
    """Decode the answers to prepared questions.

    Greedy answers are decoded side by side, a question alone, too; whatever else is asked of
    ``model.generate()`` is left to it, one question after another.

    Args:
        engine: What the questions were prepared with.
        ready: The questions.
        settings: As `Engine.settings` has checked them.
        streams: For each question as in [ifkv.Session.ask][]; False for all if None.
        seeds: For each question the seed of sampling; None draws on.
        keep: Whether the rows that were run stay in the caches, behind their contexts.

    Raises:
        InvalidInputError: There is no room for an answer.
        FingerprintMismatchError: The model's weights have changed since a question was prepared.
    """
    for one in ready:
        check_cache(engine.model, one.cache)  # weights may have changed since it was prepared
    streams = [False] * len(ready) if streams is None else streams
    seeds = [None] * len(ready) if seeds is None else seeds
    greedy = greedy_settings(settings)
    if isinstance(greedy, GreedySettings):
        return _decode(engine, ready, settings, greedy, streams, keep)
    return [
        _generate(engine, one, settings, stream, seed, keep)
        for one, stream, seed in zip(ready, streams, seeds, strict=True)
    ]


def _decode(
    engine: Engine,
    ready: Sequence[Prepared],
    settings: GenerationSettings,
    greedy: GreedySettings,
    streams: Sequence[Stream],
    keep: bool,
) -> list[Answer]:
    """Decode greedily, one row of each question in a step."""
    decoding = time.perf_counter()
    device, caches = engine.model.device, [one.cache for one in ready]
    prompts = [torch.tensor(one.prompt_ids, device=device) for one in ready]
    limits = [
        settings.new_tokens(cache.context_length, len(prompt))
        for cache, prompt in zip(caches, prompts, strict=True)
    ]
    streamers = [text_streamer(engine.tokenizer, stream) for stream in streams]
    for streamer, prompt in zip(streamers, prompts, strict=True):
        if streamer is not None:
            streamer.put(prompt[None].cpu())

    def emit(index: int, token: int) -> None:
        if streamers[index] is not None:
            streamers[index].put(torch.tensor([token]))

    try:
        logits = [one.logits for one in ready]
        found = decode(engine.model, caches, prompts, logits, greedy, limits, emit)
    finally:
        for cache in () if keep else caches:
            cache.crop()
    for streamer in streamers:
        if streamer is not None:
            streamer.end()
    seconds = time.perf_counter() - decoding
    answers = []
    for one, token_ids, limit in zip(ready, found, limits, strict=True):
        reason = finish_reason(settings, engine.tokenizer, token_ids, limit=limit)
        answers.append(answer_of(engine.tokenizer, one, token_ids, reason, seconds))
    return answers


def _generate(
    engine: Engine,
    ready: Prepared,
    settings: GenerationSettings,
    stream: Stream,
    seed: int | None,
    keep: bool,
) -> Answer:
    """Decode one answer by ``model.generate()``."""
    decoding, tokenizer = time.perf_counter(), engine.tokenizer
    prompt = torch.tensor(ready.prompt_ids)
    limit = settings.new_tokens(ready.cache.context_length, len(prompt))
    streamer = text_streamer(tokenizer, stream)
    # Which beam wins is known at the end only: its text comes in one piece.
    late = streamer is not None and settings.beams > 1
    with contextlib.ExitStack() as seeded:
        if seed is not None:
            device = engine.model.device
            own = [device] if device.type == "cuda" else []
            seeded.enter_context(torch.random.fork_rng(devices=own))
            torch.manual_seed(seed)
        sequence = run_generate(
            engine.model,
            ready.cache,
            ready.prompt_ids,
            settings,
            keep=keep,
            overrides={**TOKENS_ONLY, "streamer": None if late else streamer},
            pad_token_id=pad_token_id(tokenizer),
        )
    token_ids = sequence[0, len(prompt) :].cpu()
    if late:
        for part in (prompt, token_ids):
            streamer.put(part)
        streamer.end()
    seconds = time.perf_counter() - decoding
    reason = finish_reason(settings, tokenizer, token_ids, limit=limit, seconds=seconds)
    return answer_of(tokenizer, ready, token_ids, reason, seconds)


def answer_of(
    tokenizer: Any,
    ready: Prepared,
    token_ids: Tensor,
    reason: FinishReason,
    decode_seconds: float,
) -> Answer:
    """Build the answer that consists of these tokens.

    Args:
        tokenizer: The session's tokenizer.
        ready: The question.
        token_ids: The answer's tokens, long ``[new]``, on the CPU.
        reason: Why it ended.
        decode_seconds: How long they took.
    """
    return Answer(
        text=tokenizer.decode(token_ids, skip_special_tokens=True).strip(),
        token_ids=token_ids,
        ttft_seconds=ready.ttft_seconds,
        timings={**ready.timings, "decode": decode_seconds},
        scores=None if ready.scores is None else ready.scores.cpu(),
        attention=None if ready.attention is None else ready.attention.cpu(),
        slots=ready.slots.cpu(),
        order=ready.cache.order,
        context_ids=ready.cache.token_ids.cpu(),
        document_slices=ready.cache.document_slices,
        prompt_ids=torch.tensor(ready.prompt_ids),
        first_logits=ready.logits.float().cpu(),
        speedup_bound=ready.speedup_bound,
        question=ready.question,
        selector=ready.selector,
        selection_cost=ready.selection_cost,
        plan=ready.plan,
        tokenizer=tokenizer,
        finish_reason=reason,
        sources=ready.sources,
    )


def pad_token_id(tokenizer: Any) -> int | None:
    """Return what generate() pads with: the tokenizer's padding token, or its end-of-text token."""
    pad: int | None = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad
