"""Options of questions, as callers give them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    from ifkv.selectors import Selector
    from ifkv.session.ratio import Ratio


@dataclasses.dataclass(frozen=True, eq=False)
class AskOptions:
    """Options of one question, or of several that are asked alike; see `Session.ask`.

    Attributes:
        ratio: Recompute ratio; the session's if None.
        reorder: Whether the documents that the question finds most in go last.
        selector: Selector of the tokens to recompute; the session's if None.
        layers: Scoring layers.
        max_new_tokens: Most tokens of the answer.
        seed: Seed of sampling; for several questions one for all or one for each.
        generate_kwargs: Keywords for ``model.generate()``.
    """

    ratio: Ratio | None = None
    reorder: bool = False
    selector: str | Selector | None = None
    layers: Sequence[int] | None = None
    max_new_tokens: int | None = None
    seed: int | Sequence[int] | None = None
    generate_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def seeds(self, count: int) -> list[int | None]:
        """Return the seed of each of so many questions.

        Raises:
            InvalidInputError: A seed is no whole number from 0, or there is not one for each.
        """
        given: Any = self.seed
        if given is None or isinstance(given, Integral):
            given = [given] * count
        found = list(given) if isinstance(given, Sequence) else [given]
        for seed in found:
            whole = isinstance(seed, Integral) and not isinstance(seed, bool)
            if seed is not None and not (whole and 0 <= int(seed) < 2**63):
                raise InvalidInputError(
                    f"seed is {self.seed!r}, but must be a whole number from 0, or one for each "
                    "question."
                )
        if len(found) != count:
            raise InvalidInputError(
                f"{len(found)} seeds were given for {count} questions; give one for all, or one "
                "for each."
            )
        return found
