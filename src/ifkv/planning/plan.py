"""Plans: predicted times of a request, and the recompute ratio that they recommend."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Predicted times at one recompute ratio, in seconds.

    Attributes:
        ratio: The recompute ratio.
        rows: Tokens that are recomputed.
        stitch: Time to stitch the documents.
        select: Time to choose the tokens.
        recompute: Time for selected rows and the prompt, up to the first token's logits.
        hot: Time to first token with the documents in memory: ``stitch + select + recompute``.
        warm: Time to first token from a store on disk whose files are in the system's page cache.
            None if the disk could not be measured. Loading is added in full, although part of it
            overlaps with computation.
        cold: Time to first token from a store on disk whose files are not in the page cache; None
            likewise.
        bound: S(r), the speed-up over full prefill that the count of operations allows.
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
    """Predicted times of one request, and the recompute ratio that they recommend.

    Attributes:
        tokens: Tokens of the context.
        documents: Number of documents.
        prompt: Tokens of the prompt.
        prefill: Predicted seconds of full prefill to the first token's logits.
        kv_bytes: Bytes of the context's keys and values, in memory and in an exact store.
        forecasts: One `Forecast` for each ratio.
        ratio: Recommended ratio; None recommends full prefill.
        reason: Reason for the recommendation, in a sentence.
        doubt: Reason why these times may be far off, and what to do about it; None if the rates
            look sound. See `ifkv.planning.sanity`.
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
    """Return the recommended ratio (None for full prefill), and the reason in a sentence.

    Recommend the largest ratio that is ``speedup`` times faster to the first token than full
    prefill. If there is none, recommend the fastest ratio; if no ratio is faster than full prefill,
    recommend full prefill.

    Args:
        prefill: Seconds of full prefill.
        forecasts: One `Forecast` for each ratio.
        speedup: Speed-up over full prefill that a ratio should reach.
    """
    enough = [each.ratio for each in forecasts if each.hot * speedup <= prefill]
    if enough:
        return max(enough), (
            f"the largest of these ratios predicted to be {speedup:g}× faster than full prefill"
        )
    fastest = min(forecasts, key=lambda each: each.hot)
    if fastest.hot < prefill:
        return fastest.ratio, (
            f"the fastest of these ratios, predicted to be {prefill / fastest.hot:.2f}× faster "
            f"than full prefill; none is {speedup:g}× faster"
        )
    return None, "full prefill is predicted to be faster than any of these ratios"
