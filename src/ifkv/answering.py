"""From a prepared question to its answer: decoding, and what may be asked of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.answer import Answer, Prepared
from ifkv.errors import InvalidInputError
from ifkv.generation import check_generate_kwargs, run_generate, setting
from ifkv.selectors import Layers, Selector, resolve
from ifkv.streaming import text_streamer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.session import Session


def complete(
    model: PreTrainedModel,
    tokenizer: Any,
    ready: Prepared,
    *,
    max_new_tokens: int,
    stream: bool | Callable[[str], None],
    generate_kwargs: dict[str, Any],
    keep: bool = False,
) -> Answer:
    """Decode the answer to a prepared question.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        ready: The question.
        max_new_tokens: As in :meth:`ifkv.Session.ask`.
        stream: As in :meth:`ifkv.Session.ask`.
        generate_kwargs: As in :meth:`ifkv.Session.ask`.
        keep: Whether the rows that were run stay in the cache, behind its context.

    Raises:
        InvalidInputError: A bad keyword.
    """
    check_answer_kwargs(model, generate_kwargs)
    decoding = time.perf_counter()
    settings = {"do_sample": False, "pad_token_id": pad_token_id(tokenizer), "tokenizer": tokenizer}
    settings |= generate_kwargs
    settings |= {"max_new_tokens": max_new_tokens, "streamer": text_streamer(tokenizer, stream)}
    settings["return_dict_in_generate"] = False  # whatever a generation config says
    sequence = run_generate(model, ready.cache, ready.prompt_ids, settings, keep=keep)
    token_ids = sequence[0, len(ready.prompt_ids) :].cpu()
    return answer_of(tokenizer, ready, token_ids, time.perf_counter() - decoding)


def answer_of(tokenizer: Any, ready: Prepared, token_ids: Tensor, decode_seconds: float) -> Answer:
    """The answer that consists of these tokens.

    Args:
        tokenizer: The session's tokenizer.
        ready: The question.
        token_ids: The answer's tokens, long ``[new]``, on the CPU.
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
    )


def pad_token_id(tokenizer: Any) -> int | None:
    """What generate() pads with: the tokenizer's padding token, or its end-of-text token."""
    pad: int | None = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def stop_tokens(
    model: PreTrainedModel, tokenizer: Any, generate_kwargs: dict[str, Any]
) -> frozenset[int]:
    """Tokens that end an answer.

    Args:
        model: The model, whose generation config counts.
        tokenizer: Its tokenizer.
        generate_kwargs: Keywords for ``model.generate()``, which come before it.
    """
    given = setting(model, generate_kwargs, "eos_token_id")
    ends = [] if given is None else torch.as_tensor(given).flatten().tolist()
    return frozenset([*ends, tokenizer.eos_token_id])


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


def check_answer_kwargs(model: PreTrainedModel, generate_kwargs: dict[str, Any]) -> None:
    """Refuse, before any work, what one answer has no place for."""
    for key in ("streamer", "return_dict_in_generate", "num_return_sequences"):
        if key in generate_kwargs:
            raise InvalidInputError(
                f"{key}={generate_kwargs[key]!r} cannot be given here, where one Answer is made; "
                "use ifkv.generate for it (and stream= for streaming)."
            )
    check_generate_kwargs(model, generate_kwargs)
