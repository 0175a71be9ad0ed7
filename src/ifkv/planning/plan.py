"""What a plan predicts, and which ratio it recommends for that."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What one recompute ratio is predicted to take; all times in seconds.

    Attributes:
        ratio: The recompute ratio.
        rows: Tokens that are recomputed.
        stitch: Stitching the documents.
        select: Choosing the tokens.
        recompute: Selected rows and the prompt, up to the first token's logits.
        hot: Time to first token with the documents in memory: the three together.
        warm: The same from a store on the disk, out of the system's page cache; None if the disk
            could not be measured. Loading is added in full, as if nothing of it were hidden.
        cold: The same, past the page cache.
        bound: S(r): how many times sooner than plain prefill the operations alone allow.
    """

    ratio: float
    rows: int
    stitch: float
    select: float
    recompute: float
    hot: float
    warm: float | None
    cold: float | None
    bound: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """Predictions for one request, and what they recommend.

    Attributes:
        tokens: Tokens of the context.
        documents: How many documents it has.
        prompt: Tokens of the prompt.
        prefill: Predicted seconds of plain prefill to the first token's logits.
        kv_bytes: Bytes of the context's keys and values, in memory and in an exact store.
        forecasts: One for each ratio.
        ratio: The ratio that is recommended; None stands for plain prefill.
        reason: Why, in a sentence.
        doubt: Why these times may be far off, and what to do about it; None if nothing is known
            against them. See `ifkv.planning.sanity`.
    """

    tokens: int
    documents: int
    prompt: int
    prefill: float
    kv_bytes: int
    forecasts: tuple[Forecast, ...]
    ratio: float | None
    reason: str
    doubt: str | None = None


def choose(
    prefill: float, forecasts: Sequence[Forecast], speedup: float
) -> tuple[float | None, str]:
    """The ratio that a plan recommends (None for plain prefill), and the reason.

    The largest that is ``speedup`` times as soon as plain prefill; if none is, the soonest; plain
    prefill, where no ratio is sooner.

    Args:
        prefill: Seconds of plain prefill.
        forecasts: One for each ratio.
        speedup: How many times as soon is soon enough.
    """
    enough = [each.ratio for each in forecasts if each.hot * speedup <= prefill]
    if enough:
        return max(enough), (
            f"the largest of these ratios predicted to be {speedup:g} times as soon as plain "
            "prefill"
        )
    soonest = min(forecasts, key=lambda each: each.hot)
    if soonest.hot < prefill:
        return soonest.ratio, (
            f"the soonest of these ratios, predicted to be {prefill / soonest.hot:.2f} times as "
            f"soon as plain prefill; none is {speedup:g} times as soon"
        )
    return None, "plain prefill is predicted to be sooner than any of these ratios"
