"""Greedy decoding of several requests side by side: one row each, one pass a step.

A step's rows read the weights once for all requests. Each cache keeps its length, so there is no
padding, and no request sees another. A request that has ended leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.cache.checks import check_answerable, check_cache
from ifkv.cache.stitched import StitchedCache
from ifkv.errors import InvalidInputError
from ifkv.forward.graphs import run_to_attention
from ifkv.forward.layers import embed, row_logits, run_layers
from ifkv.generation.checks import check_settings
from ifkv.generation.generate import has_prompt
from ifkv.generation.greedy import GreedySettings, greedy_settings, penalised
from ifkv.generation.settings import GenerationSettings
from ifkv.models.decoder import DecoderView
from ifkv.patching.handle import PatchHandle, handle_of
from ifkv.steps.recompute import recompute_many
from ifkv.steps.requests import check_counts, check_private
from ifkv.steps.rows_pass import RowsPass
from ifkv.utils.checks import naming_request, token_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def generate_many(
    model: PreTrainedModel,
    caches: Sequence[StitchedCache],
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    max_new_tokens: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    repetition_penalty: float | None = None,
    emit: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Continue several prompts greedily, each behind its cache's context.

    Each answer is the one that ``ifkv.generate(model, cache, prompt, do_sample=False)`` gives,
    but for the rounding of projections that run over another number of rows. Sampling, beams and
    the other settings of ``model.generate()`` are left to [ifkv.generate][].

    Args:
        model: A patched model.
        caches: For each request a separate cache in the global geometry; afterwards they end with
            their contexts again.
        prompts: For each request the tokens to be answered. Those that a fused
            [ifkv.recompute_many][] has run already are not run again, but for the last.
        max_new_tokens: Length of each answer at most; if None, the generation config's limit, or
            64.
        eos_token_id: Tokens that end an answer; the generation config's if None.
        repetition_penalty: As in ``model.generate()``; the generation config's if None.
        emit: Called with a request's number and each new token.

    Returns:
        For each request the new tokens, long ``[new]``, on the CPU.

    Raises:
        InvalidInputError: Not as many prompts as caches, a cache given twice, bad ids, rows
            appended that are not the prompt's, too many tokens, or a generation config that asks
            for more than a greedy answer. All is checked before any work.
        NotPatchedError: The model is not patched.
        GeometryError: A cache's geometry is not global.
        FingerprintMismatchError: A cache belongs to another model.

    Examples:
        >>> import ifkv
        >>> from ifkv.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> with ifkv.patch(model):
        ...     a, b = ifkv.prefill_documents(model, [[5, 6, 7], [8, 9]], prefix=[1])
        ...     caches = ifkv.stitch_many(model, [[a, b], [b]])
        ...     answers = ifkv.generate_many(model, caches, [[12], [13, 14]], max_new_tokens=3)
        >>> [len(answer) <= 3 for answer in answers]
        [True, True]
    """
    check_counts(len(caches), prompts=prompts)
    check_private(caches)
    own: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": eos_token_id,
        "repetition_penalty": repetition_penalty,
    }
    asked = GenerationSettings.of(model, {k: v for k, v in own.items() if v is not None})
    check_settings(model, asked)
    settings = greedy_settings(asked)
    if isinstance(settings, str):
        raise InvalidInputError(
            f"the model's generation config has {settings}, which generate_many has no part for; "
            "answer one by one with ifkv.generate, or change model.generation_config."
        )
    ids, limits = [], []
    for index, (cache, prompt) in enumerate(zip(caches, prompts, strict=True)):
        with naming_request(index):
            tokens, limit = _check_request(model, cache, prompt, asked)
        ids.append(tokens)
        limits.append(limit)
    fresh = [i for i, cache in enumerate(caches) if not has_prompt(cache, ids[i])]
    try:
        found: dict[int, Tensor] = {}
        logits = recompute_many(
            model,
            [caches[i] for i in fresh],
            [()] * len(fresh),
            prompts=[ids[i] for i in fresh],
        )
        for index, row in zip(fresh, logits, strict=True):
            assert row is not None
            found[index] = row
        ready = [index for index in range(len(caches)) if index not in found]
        for index in ready:
            caches[index].crop(-1)  # its last token runs again, for its logits
        if ready:
            again = _step(
                model,
                handle_of(model),
                [caches[i] for i in ready],
                [int(ids[i][-1]) for i in ready],
            )
            found.update(zip(ready, again, strict=True))
        rows = [found[index] for index in range(len(caches))]
        return decode(model, caches, ids, rows, settings, limits, emit)
    finally:
        for cache in caches:
            cache.crop()


def _check_request(
    model: PreTrainedModel,
    cache: StitchedCache,
    prompt_ids: Sequence[int] | Tensor,
    settings: GenerationSettings,
) -> tuple[Tensor, int]:
    """Return the prompt's tokens, on the model's device, and the answer's length at most.

    Raises the errors of `generate_many`.
    """
    handle = check_cache(model, cache)
    prompt = token_tensor(model, prompt_ids, "the prompt").to(model.device)
    if not has_prompt(cache, prompt):
        check_answerable(cache, "generate_many")
    length = cache.query_position + len(prompt)
    handle.rope.check_length(length, "context and prompt")
    limit = settings.new_tokens(cache.context_length, len(prompt))
    handle.rope.check_answer(length, limit, "context, prompt and answer")
    return prompt, limit


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    caches: Sequence[StitchedCache],
    prompts: Sequence[Tensor],
    logits: Sequence[Tensor],
    settings: GreedySettings,
    limits: Sequence[int],
    emit: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Decode behind prompts that have been run.

    Args:
        model: A patched model.
        caches: For each request its cache, which ends with its prompt; rows are appended.
        prompts: For each request its prompt's tokens, on the model's device.
        logits: For each request those of its first new token, ``[vocabulary]``.
        settings: Settings of the answers.
        limits: Length of each answer at most, at least 1.
        emit: As in `generate_many`.

    Returns:
        For each request the new tokens, long ``[new]``, on the CPU.
    """
    if not caches:
        return []
    answers: list[list[int]] = [[] for _ in caches]
    penalty, seen = settings.repetition_penalty, list[Tensor]()
    if penalty != 1:
        pairs = zip(caches, prompts, strict=True)
        seen = [torch.cat((cache.token_ids, prompt)) for cache, prompt in pairs]
    handle = handle_of(model)  # once for all steps
    active = list(range(len(caches)))
    rows = torch.stack(list(logits))
    while True:
        if penalty != 1:
            rows = penalised(rows, [seen[index] for index in active], penalty)
        chosen = rows.argmax(dim=-1)
        tokens: list[int] = chosen.tolist()  # the only wait for the device in a step
        for index, token in zip(active, tokens, strict=True):
            answers[index].append(token)
            if penalty != 1:
                seen[index] = torch.cat((seen[index], seen[index].new_tensor([token])))
            if emit is not None:
                emit(index, token)
        going = [
            at
            for at, token in enumerate(tokens)
            if token not in settings.eos_token_ids and len(answers[active[at]]) < limits[active[at]]
        ]
        active = [active[at] for at in going]
        if not active or settings.closed:
            return [torch.tensor(answer) for answer in answers]
        going_on = [caches[index] for index in active]
        rows = _step(model, handle, going_on, [tokens[at] for at in going])


def _step(
    model: PreTrainedModel,
    handle: PatchHandle,
    caches: Sequence[StitchedCache],
    tokens: Sequence[int],
) -> Tensor:
    """Append one token to each cache; return the next logits, ``[requests, vocabulary]``."""
    lengths = [cache.get_seq_length() + 1 for cache in caches]
    for cache, length in zip(caches, lengths, strict=True):
        for layer in cache.layers:
            layer.reserve(length)
    plan = handle.backend.plan_requests(
        [torch.tensor([length - 1]) for length in lengths], lengths, model.device
    )
    hidden = embed(model, torch.tensor(list(tokens), device=model.device))
    counts = [1] * len(caches)
    run = RowsPass(handle, caches, counts, plan)
    positions = run.positions
    rotation = handle.rope.rotation(positions, hidden.dtype)
    depth, start = DecoderView(model).num_layers, 0
    if handle.captures is not None:
        # Graphs end at the last attention: the last layer runs once more from its input.
        start = depth - 1
        writing = RowsPass(handle, caches, counts, plan, skip_attention_in=start)
        rows = positions, rotation, writing, start
        hidden = run_to_attention(model, handle.captures, hidden, *rows)
        run = RowsPass(handle, caches, counts, plan, write=False)
    hidden = run_layers(model, hidden, positions, rotation, run, depth, start=start)
    for cache, length in zip(caches, lengths, strict=True):
        for layer in cache.layers:
            layer.length = length
    return row_logits(model, hidden)
