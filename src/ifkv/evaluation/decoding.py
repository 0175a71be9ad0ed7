"""Answers read or decoded after a cache of context and prompt, which is left as it was.

Any transformers cache will do: a plain one after a full prefill, a stitched one after
``recompute(..., prompt_ids=...)``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.models.compat import cache_keyword

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def teacher_forced(
    model: PreTrainedModel, cache: Any, first_logits: Tensor, token_ids: Tensor
) -> Tensor:
    """Return the logits that predict each token of a given answer.

    Args:
        model: A patched model.
        cache: Cache of context and prompt; unchanged afterwards.
        first_logits: Logits of the prompt's last row, ``[vocabulary]``.
        token_ids: Token ids of the answer, long ``[tokens]``.

    Returns:
        ``[tokens, vocabulary]``; row i predicts token i.
    """
    rows = [first_logits[None]]
    if len(token_ids) > 1:
        rows.append(_forward(model, cache, token_ids[:-1]))
        cache.crop(-(len(token_ids) - 1))
    return torch.cat(rows)


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    cache: Any,
    first_logits: Tensor,
    *,
    max_new_tokens: int,
    stop: Collection[int] = (),
    draft: Tensor | None = None,
    draft_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode greedily.

    Args:
        model: A patched model.
        cache: Cache of context and prompt; unchanged afterwards.
        first_logits: Logits of the prompt's last row, ``[vocabulary]``.
        max_new_tokens: Largest number of tokens.
        stop: Ids that end the answer; the one found is kept.
        draft: An answer ``[tokens]`` to follow as far as its tokens are the most likely. Answers to
            the same question mostly agree, so few tokens are left to decode.
        draft_logits: Logits of the draft, from `teacher_forced`.

    Returns:
        Token ids, long ``[tokens]`` on the model's device, and the logits that chose them,
        ``[tokens, vocabulary]``.
    """
    logits = [first_logits]
    if draft is not None and draft_logits is not None:
        same = (draft_logits.argmax(dim=-1) == draft).long().cumprod(dim=0)
        agreed = min(int(same.sum()), len(draft) - 1, max_new_tokens - 1)
        logits = list(draft_logits[: agreed + 1])
    tokens = [int(row.argmax()) for row in logits]
    ran = 0
    while tokens[-1] not in stop and len(tokens) < max_new_tokens:
        pending = torch.tensor(tokens[ran:], device=first_logits.device)
        logits.append(_forward(model, cache, pending)[-1])
        tokens.append(int(logits[-1].argmax()))
        ran += len(pending)
    if ran:
        cache.crop(-ran)
    return torch.tensor(tokens, device=first_logits.device), torch.stack(logits)


def _forward(model: PreTrainedModel, cache: Any, token_ids: Tensor) -> Tensor:
    """Append tokens to the cache and return the logits of each, ``[tokens, vocabulary]``."""
    ids = token_ids[None].to(model.device)
    seen = torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.long, device=ids.device)
    run: Any = model
    named = cache_keyword(model, cache)
    logits: Tensor = run(ids, attention_mask=seen, use_cache=True, **named).logits[0]
    return logits
