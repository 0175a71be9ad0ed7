"""Hypothesis strategies for the library's inputs. Import this module only where hypothesis is.

Sizes are small on purpose: hypothesis finds a mistake at three tokens as well as at three thousand,
    and shrinks to an example that can be read.
and shrinks to an example that can be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import hypothesis.strategies as st

from ifkv.testing.models import rope_types
from ifkv.testing.tiny_configs import ARITHMETICS, FIXED_WIDTH, SLIDING_FAMILIES

VOCAB_SIZE = 97
"""Vocabulary of `models.tiny_model` by default."""


@dataclass(frozen=True)
class Request:
    """Token ids of one request.

    Attributes:
        prefix: Prefix tokens, possibly none.
        documents: At least one document, none of them empty.
        query: Scoring tokens, at least one.
        prompt: Prompt tokens, at least one.
    """

    prefix: list[int]
    documents: list[list[int]]
    query: list[int]
    prompt: list[int]

    @property
    def context(self) -> list[int]:
        """Return prefix and documents as one sequence."""
        return [*self.prefix, *(token for document in self.documents for token in document)]


@dataclass(frozen=True)
class ModelOptions:
    """Arguments of `models.tiny_model` that change the arithmetic of a layer."""

    family: str
    rope: str
    head_dim: int | None
    num_kv_heads: int
    sliding_window: int | None
    seed: int


def token_ids(
    min_size: int = 1, max_size: int = 12, vocab_size: int = VOCAB_SIZE
) -> st.SearchStrategy[list[int]]:
    """Draw sequences of token ids."""
    return st.lists(st.integers(0, vocab_size - 1), min_size=min_size, max_size=max_size)


def prefixes(max_size: int = 4, vocab_size: int = VOCAB_SIZE) -> st.SearchStrategy[list[int]]:
    """Draw prefixes, including the empty one."""
    return token_ids(0, max_size, vocab_size)


def documents(
    max_documents: int = 5,
    max_length: int = 12,
    vocab_size: int = VOCAB_SIZE,
    min_documents: int = 1,
) -> st.SearchStrategy[list[list[int]]]:
    """Draw lists of documents of different lengths, none of them empty."""
    one = token_ids(1, max_length, vocab_size)
    return st.lists(one, min_size=min_documents, max_size=max_documents)


def queries(max_size: int = 6, vocab_size: int = VOCAB_SIZE) -> st.SearchStrategy[list[int]]:
    """Draw scoring tokens."""
    return token_ids(1, max_size, vocab_size)


def prompts(max_size: int = 6, vocab_size: int = VOCAB_SIZE) -> st.SearchStrategy[list[int]]:
    """Draw prompt tokens."""
    return token_ids(1, max_size, vocab_size)


@st.composite
def requests(
    draw: st.DrawFn,
    min_documents: int = 1,
    max_documents: int = 5,
    max_length: int = 12,
    vocab_size: int = VOCAB_SIZE,
) -> Request:
    """Draw whole requests."""
    return Request(
        prefix=draw(prefixes(vocab_size=vocab_size)),
        documents=draw(documents(max_documents, max_length, vocab_size, min_documents)),
        query=draw(queries(vocab_size=vocab_size)),
        prompt=draw(prompts(vocab_size=vocab_size)),
    )


def slot_subsets(total: int, *, min_size: int = 0, first: int = 0) -> st.SearchStrategy[list[int]]:
    """Draw ascending sets of distinct slots out of `first, ..., total - 1`.

    Args:
        total: Number of slots of the context.
        min_size: Smallest set; at most `total - first`.
        first: Lowest slot to draw, for instance the end of the first document.
    """
    if first >= total:
        return st.just([])
    slots = st.integers(first, total - 1)
    return st.lists(slots, min_size=min_size, max_size=total - first, unique=True).map(sorted)


def orders(count: int) -> st.SearchStrategy[list[int]]:
    """Draw permutations of `count` documents."""
    return st.permutations(range(count)).map(list)


def ratios() -> st.SearchStrategy[float]:
    """Draw recompute ratios, including 0 and 1."""
    return st.floats(0.0, 1.0, allow_nan=False)


def families(among: Sequence[str] = ARITHMETICS) -> st.SearchStrategy[str]:
    """Draw some of the model families that `models.tiny_model` builds."""
    return st.sampled_from(among)


def seeds(count: int = 4) -> st.SearchStrategy[int]:
    """Draw one of few seeds for weights, so that `models.shared_tiny_model` finds built models."""
    return st.integers(0, count - 1)


@st.composite
def model_options(
    draw: st.DrawFn, *, sliding: bool = True, among: Sequence[str] = ARITHMETICS
) -> ModelOptions:
    """Draw combinations of family, RoPE type with fixed frequencies, heads and sliding window.

    Pass them on as `shared_tiny_model(**dataclasses.asdict(options))`.

    Args:
        draw: Given by hypothesis.
        sliding: True to draw sliding windows too.
        among: Families to draw from.
    """
    family = draw(families(among))
    fixed = [rope for rope in rope_types(family) if rope not in ("dynamic", "longrope")]
    windows = [None, 5] if sliding and family in SLIDING_FAMILIES else [None]
    return ModelOptions(
        family=family,
        rope=draw(st.sampled_from(fixed)),
        head_dim=draw(st.sampled_from([None] if family in FIXED_WIDTH else [None, 24])),
        num_kv_heads=draw(st.sampled_from([1, 2, 4])),
        sliding_window=draw(st.sampled_from(windows)),
        seed=draw(seeds(2)),
    )
