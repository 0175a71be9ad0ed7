"""Comparison of one question's answers: full prefill, stitch only, ifkv."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ifkv.evaluation.decoding import teacher_forced
from ifkv.evaluation.token_metrics import divergence
from ifkv.generation.finish_reason import FinishReason, finish_reason
from ifkv.models.compat import cache_keyword
from ifkv.planning.support import check_plannable
from ifkv.selectors import DEFAULT_SELECTOR, Budget, resolve
from ifkv.session.complete import TOKENS_ONLY, complete, pad_token_id
from ifkv.session.options import AskOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.selectors import Selector
    from ifkv.session.answer import Answer, Prepared
    from ifkv.session.ratio import Ratio
    from ifkv.session.session import Session

# Decoding of a comparison, whatever the generation config says.
GREEDY = {"do_sample": False, "num_beams": 1}


def overruled(model: PreTrainedModel) -> str:
    """Return the settings of a model's generation config that a comparison overrides, in words."""
    config = model.generation_config
    found = {name: getattr(config, name, None) for name in GREEDY}
    return ", ".join(
        f"{name}={found[name]!r}"
        for name, value in GREEDY.items()
        if found[name] is not None and found[name] != value
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Way:
    """Way of answering a question, with its measurements.

    Attributes:
        name: ``"full prefill"``, ``"stitch only"`` or ``"ifkv, r = ..."``.
        ttft_seconds: Seconds from the question's arrival to the first token's logits.
        speedup: Full prefill's time to first token over this way's.
        bound: S(r), or None for full prefill.
        kl: Mean over the tokens of full prefill's answer of KL(full || this), in nats. None if
            documents were moved: full prefill read them in another order, so this would be the
            distance between two contexts.
        text: The answer.
        answer: The full `Answer`; None for full prefill.
        finish_reason: As in [ifkv.Answer][].
        tokens: Number of tokens of the answer.
    """

    name: str
    ttft_seconds: float
    speedup: float
    bound: float | None
    kl: float | None
    text: str
    answer: Answer | None
    finish_reason: FinishReason
    tokens: int


@torch.no_grad()
def compare(
    session: Session,
    question: str,
    *,
    documents: Sequence[str] | None = None,
    ratios: Sequence[Ratio] = (0.0, 0.15),
    reorder: bool = False,
    selector: str | Selector | None = None,
    max_new_tokens: int | None = None,
) -> list[Way]:
    """Answer a question by full prefill and at several recompute ratios.

    Full prefill is the model's own forward over the same token ids, asked for the last row's logits
    only. Every way decodes greedily, whatever the model's generation config says of sampling and
    beams, so that answers differ only by the context they were read from.

    Args:
        session: The session that holds the documents.
        question: The question.
        documents: As in `Session.ask`.
        ratios: Recompute ratios, as in `Session.ask`; 0 is stitch only.
        reorder: As in `Session.ask`; not applied at ratio 0.
        selector: As in `Session.ask`.
        max_new_tokens: As in `Session.ask`, of each answer.

    Returns:
        Full prefill first, then one way per ratio.

    Raises:
        InvalidInputError: A ratio is ``"auto"``, but such a request cannot be planned.
    """
    if "auto" in ratios:
        check_plannable(
            session.selector if selector is None else resolve(selector), reorder=reorder
        )
    model: Any = session.model
    context = session.context_ids(documents)
    prompt = session.format.prompt_ids(question)
    options = AskOptions(max_new_tokens=max_new_tokens, generate_kwargs=GREEDY)
    settings = session.engine.settings(options)
    limit = settings.new_tokens(len(context), len(prompt))
    ids = torch.cat((context, torch.tensor(prompt)))[None].to(model.device)

    started = time.perf_counter()
    # A plain cache keeps every key, so that it can be cropped where layers slide.
    cache = DynamicCache()
    first = model(ids, use_cache=True, logits_to_keep=1, **cache_keyword(model, cache))
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    full_seconds = time.perf_counter() - started
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **settings.keywords(
            len(context),
            len(prompt),
            overrides=TOKENS_ONLY,
            pad_token_id=pad_token_id(session.tokenizer),
        ),
        **cache_keyword(model, _shorter(cache)),
    )
    reply = generated[0, ids.shape[1] :]
    reason = finish_reason(settings, session.tokenizer, reply.cpu(), limit=limit)
    # generate() left all but the reply's last token in the cache; read the reply's rows anew.
    cache.crop(-(cache.get_seq_length() - ids.shape[1]))
    truth = teacher_forced(model, cache, first.logits[0, -1], reply)
    text = session.tokenizer.decode(reply, skip_special_tokens=True).strip()
    ways = [Way("full prefill", full_seconds, 1.0, None, 0.0, text, None, reason, len(reply))]
    del first, cache

    for ratio in ratios:
        stitched = ratio != "auto" and Budget.of(ratio).nothing
        ready = session.prepare(
            question,
            documents=documents,
            ratio=ratio,
            reorder=reorder and not stitched,
            selector=selector,
        )
        logits = teacher_forced(model, ready.cache, ready.logits, reply)
        (answer,) = complete(session.engine, [ready], settings)
        moved = list(answer.order) != sorted(answer.order)
        ways.append(
            Way(
                name="stitch only" if stitched else _name(ready, ratio),
                ttft_seconds=ready.ttft_seconds,
                speedup=full_seconds / ready.ttft_seconds,
                bound=ready.speedup_bound,
                kl=None if moved else divergence(truth, logits),
                text=answer.text,
                answer=answer,
                finish_reason=answer.finish_reason,
                tokens=len(answer.token_ids),
            )
        )
    return ways


def _name(ready: Prepared, ratio: Ratio) -> str:
    by = "" if ready.selector == DEFAULT_SELECTOR else f", {ready.selector}"
    if ready.plan is not None:
        planned = "full prefill" if ready.plan.ratio is None else f"r = {ready.plan.ratio:g}"
        return f"ifkv, planned: {planned}{by}"
    shown = f"{ratio:g}" if isinstance(ratio, float | int) else str(ratio)
    return f"ifkv, r = {shown}{by}"


def _shorter(cache: Any) -> Any:
    """Return the cache without its last row, which generate() needs to run."""
    cache.crop(-1)
    return cache
