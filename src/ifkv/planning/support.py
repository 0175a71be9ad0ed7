"""Check that a request's time to first token can be predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ifkv.errors import InvalidInputError
from ifkv.selectors import (
    AttentionNorm,
    QueryRanked,
    Selector,
    SensitivityAware,
    SinkAware,
    ValueAware,
)
from ifkv.steps.select import budget
from ifkv.utils.checks import check_positive


def check_plannable(selector: Selector, *, reorder: bool = False) -> QueryRanked:
    """Refuse requests whose time to first token cannot be predicted.

    Returns:
        The selector.

    Raises:
        InvalidInputError: Documents are reordered, or the selector does more than run the query
            once over the cache and take norms there.
    """
    if not reorder and (
        type(selector) in (ValueAware, SinkAware, SensitivityAware)
        or (type(selector) is AttentionNorm and selector.geometry == "global")
    ):
        assert isinstance(selector, QueryRanked)
        return selector
    found = "reorder=True" if reorder else f"selector={str(selector)!r}"
    raise InvalidInputError(
        f"no ratio can be planned (ratio='auto', ifkv plan) with {found}: its time is not "
        "predicted. Take sink-aware, sensitivity-aware, value-aware or attention-norm, without "
        "reordering, or give a ratio between 0 and 1."
    )


def check_request(
    tokens: int,
    *,
    documents: int,
    prompt: int,
    question: int,
    ratios: Sequence[float],
    speedup: float,
    positions: int | None,
) -> None:
    """Refuse impossible numbers, before anything is measured.

    Args:
        tokens: As in `Planner.plan`, like the next five.
        documents: Likewise.
        prompt: Likewise.
        question: Likewise.
        ratios: Likewise.
        speedup: Likewise.
        positions: Positions that the model has; None if there is no limit.

    Raises:
        InvalidInputError: A number that is not positive, more documents than tokens, a ratio
            outside [0, 1] or none at all, or more tokens than the model has positions.
    """
    for what, value in (
        ("tokens", tokens),
        ("documents", documents),
        ("prompt", prompt),
        ("question", question),
    ):
        check_positive(value, what)
    if documents > tokens:
        raise InvalidInputError(
            f"{documents} documents cannot be made of {tokens} tokens; each has at least one."
        )
    if positions is not None and tokens + prompt > positions:
        raise InvalidInputError(
            f"{tokens} tokens and a prompt of {prompt} are {tokens + prompt}, but this model "
            f"has {positions} positions; take fewer."
        )
    if not math.isfinite(speedup) or speedup <= 0:
        raise InvalidInputError(f"speedup is {speedup!r}, but must be a number above 0.")
    if not ratios:
        raise InvalidInputError("there are no ratios to choose among; give at least one.")
    for ratio in ratios:
        budget(tokens, ratio)
