"""Which requests' times to first token can be predicted."""

from __future__ import annotations

from ifkv.errors import InvalidInputError
from ifkv.selectors import (
    AttentionNorm,
    QueryRanked,
    Selector,
    SensitivityAware,
    SinkAware,
    ValueAware,
)


def check_plannable(selector: Selector, *, reorder: bool = False) -> QueryRanked:
    """Refuse requests whose time to first token plans know nothing of.

    Returns:
        The selector.

    Raises:
        InvalidInputError: Documents are reordered, or the selector does more than to run the query
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
        f"no ratio can be planned (ratio='auto', ifkv plan) with {found}: what that takes is not "
        "predicted. Take sink-aware, sensitivity-aware, value-aware or attention-norm, without "
        "reordering, or give a ratio between 0 and 1."
    )
