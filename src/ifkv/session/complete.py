"""From a prepared question to its answer: decoding, and what may be asked of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.errors import InvalidInputError
from ifkv.generation.checks import check_answer_settings
from ifkv.generation.finish_reason import FinishReason, finish_reason
from ifkv.generation.generate import run_generate
from ifkv.generation.settings import GenerationSettings
from ifkv.generation.streaming import text_streamer
from ifkv.selectors import Layers, Selector, resolve
from ifkv.session.answer import Answer, Prepared

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.session.session import Session


# An answer is tokens, whatever a generation config wants beside them.
TOKENS_ONLY = {
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}


def answer_settings(
    session: Session, max_new_tokens: int | None, generate_kwargs: Mapping[str, Any]
) -> GenerationSettings:
    """Make the settings of answers, checked before any work.

    Args:
        session: The session, whose model's generation config counts where nothing else is said.
        max_new_tokens: As in [ifkv.Session.ask][].
        generate_kwargs: As in [ifkv.Session.ask][].

    Raises:
        InvalidInputError: A setting that an answer has no place for, or a bad one.
    """
    given = dict(generate_kwargs)
    if max_new_tokens is not None:
        given["max_new_tokens"] = max_new_tokens
    if given.get("tokenizer") is None:
        given["tokenizer"] = session.tokenizer  # for stop_strings
    settings = GenerationSettings.of(session.model, given)
    check_answer_settings(session.model, settings)
    return settings


def check_room(
    session: Session,
    settings: GenerationSettings,
    question: str,
    documents: Sequence[str] | None,
) -> None:
    """Refuse, before any work, a length that context and prompt reach already.

    Raises:
        InvalidInputError: There is no room for an answer; or as of [ifkv.Session.ask][].
    """
    if settings.counts_prompt:
        context = len(session.context_ids(documents))
        settings.new_tokens(context, len(session.format.prompt_ids(question)))


def complete(
    model: PreTrainedModel,
    tokenizer: Any,
    ready: Prepared,
    settings: GenerationSettings,
    *,
    stream: bool | Callable[[str], None],
    keep: bool = False,
) -> Answer:
    """Decode the answer to a prepared question.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        ready: The question.
        settings: As `answer_settings` has checked them.
        stream: As in [ifkv.Session.ask][].
        keep: Whether the rows that were run stay in the cache, behind its context.

    Raises:
        InvalidInputError: There is no room for an answer.
    """
    decoding = time.perf_counter()
    prompt = torch.tensor(ready.prompt_ids)
    limit = settings.new_tokens(ready.cache.context_length, len(prompt))
    streamer = text_streamer(tokenizer, stream)
    # Which beam wins is known at the end only: its text comes in one piece.
    late = streamer is not None and settings.beams > 1
    sequence = run_generate(
        model,
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
    """The answer that consists of these tokens.

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
    """What generate() pads with: the tokenizer's padding token, or its end-of-text token."""
    pad: int | None = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def chosen_selector(
    session: Session, selector: str | Selector | None, layers: Sequence[int] | None
) -> Selector:
    """A request's selector: the session's if it gives none, with its layers if it gives some.

    Raises:
        InvalidInputError: There is no such selector, or layers come with one that has no scoring
            layers or names its own.
    """
    rule = session.selector if selector is None else resolve(selector)
    if layers is None:
        return rule
    found: Any = rule
    options: tuple[Any, ...] = dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
    usual = {option.name: option.default for option in options}.get("layers")
    if not isinstance(usual, Layers):
        raise InvalidInputError(
            f"layers={layers!r} is given, but the selector {rule} has no scoring layers; leave "
            "them out."
        )
    if found.layers != usual:
        raise InvalidInputError(
            f"layers={layers!r} is given, but the selector {rule} names its own; give them once."
        )
    changed: Selector = dataclasses.replace(found, layers=Layers.of(layers))
    return changed
