"""Reasons why generation ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from ifkv.generation.settings import GenerationSettings

FinishReason = Literal["stop", "stop_string", "length", "time", "criteria", "closed"]

# In words, for answers that the model did not end itself.
CUT = {
    "length": "cut off at {tokens} tokens",
    "time": "cut off at its max_time",
    "criteria": "ended by stopping_criteria",
    "closed": "closed by its reader",
}


def finish_reason(
    settings: GenerationSettings,
    tokenizer: Any,
    token_ids: Tensor,
    *,
    limit: int,
    seconds: float = 0.0,
) -> FinishReason:
    """Return why generation ended.

    Args:
        settings: Settings of the answer.
        tokenizer: The session's tokenizer.
        token_ids: The answer's tokens, long ``[new]``, on the CPU.
        limit: Tokens that it could have at most.
        seconds: Seconds that it took.

    Returns:
        ``"stop"`` for a stop token, ``"stop_string"``, ``"length"``, ``"time"`` for ``max_time``,
        ``"closed"`` for a stream that was closed, or ``"criteria"`` for the caller's own.
    """
    from ifkv.generation.checks import functions  # they need torch, which reports do not import
    from ifkv.generation.streaming import Closing

    full = len(token_ids) >= limit
    forced = full and settings.get("forced_eos_token_id") is not None
    if len(token_ids) and not forced and int(token_ids[-1]) in settings.stop_token_ids:
        return "stop"
    criteria = functions("stopping_criteria", settings.given.get("stopping_criteria"))
    if any(isinstance(each, Closing) and each.closed for each in criteria):
        return "closed"
    strings = settings.get("stop_strings")
    if strings:
        listed = [strings] if isinstance(strings, str) else strings
        text = tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        if any(string in text for string in listed):
            return "stop_string"
    if full:
        return "length"
    own = [each for each in criteria if not isinstance(each, Closing)]
    most = settings.get("max_time")
    if most is not None and (seconds >= most or not own):
        return "time"
    if own or not strings:
        return "criteria"
    return "stop_string"  # one that began in the prompt


def cut_sign(reason: FinishReason, tokens: int) -> str:
    """Say in words that an answer was cut off; empty if the model ended it.

    Args:
        reason: Why it ended.
        tokens: The number of its tokens.
    """
    return CUT.get(reason, "").format(tokens=tokens)
