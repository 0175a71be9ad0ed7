"""The first difference between two prefixes, shown in a few words."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# Tokens that are shown before and behind the first that differs.
_BEFORE, _BEHIND = 4, 12


def prefix_difference(
    one: Tensor, other: Tensor, decode: Callable[[list[int]], str] | None = None
) -> tuple[str, str]:
    """Show two prefixes around the first token in which they differ.

    Args:
        one: Token ids, long ``[P]``.
        other: Token ids, long ``[Q]``, which differ from them.
        decode: Turns token ids into text; without it the ids are shown.

    Returns:
        The part of each prefix there, as text or ids.
    """
    first, second = one.tolist(), other.tolist()
    pairs = zip(first, second, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    return _around(first, at, decode), _around(second, at, decode)


def _around(ids: list[int], at: int, decode: Callable[[list[int]], str] | None) -> str:
    start, stop = max(0, at - _BEFORE), at + _BEHIND
    part = ids[start:stop]
    shown = repr(decode(part)) if decode is not None else str(part)
    if start == 0 and stop >= len(ids):
        return shown
    return f"{shown} (at token {at} of {len(ids)})"
