"""Attention by its definition, under an explicit mask: what fast paths are compared with."""

from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from hypothesis import settings
from torch import Tensor

often = settings(max_examples=max(100, settings.default.max_examples))
"""For properties that take a millisecond and have many branches to hit."""


@dataclass(frozen=True)
class Heads:
    """Shapes and random content of an attention problem."""

    kv_heads: int
    group: int
    head_dim: int
    seed: int

    def draw(self, rows: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Query `[1, heads, rows, head_dim]`, keys and values `[1, kv_heads, keys, head_dim]`."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(heads: int, length: int) -> Tensor:
            shape = (1, heads, length, self.head_dim)
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        query = normal(self.kv_heads * self.group, rows) * 1.5
        return query, normal(self.kv_heads, keys), normal(self.kv_heads, keys)


def heads() -> st.SearchStrategy[Heads]:
    """GQA ratios from one query head a key head to four, odd and explicit head dimensions."""
    return st.builds(
        Heads,
        kv_heads=st.sampled_from([1, 2, 3]),
        group=st.sampled_from([1, 2, 4]),
        head_dim=st.sampled_from([4, 6, 16, 24]),
        seed=st.integers(0, 1000),
    )


@st.composite
def scattered_slots(draw: st.DrawFn, max_runs: int = 8, max_gap: int = 12) -> list[int]:
    """Ascending slots made of runs and gaps, so that every way of cutting them occurs."""
    slots: list[int] = []
    position = 0
    for _ in range(draw(st.integers(1, max_runs))):
        position += draw(st.integers(0, max_gap))
        length = draw(st.integers(1, 9))
        slots += range(position, position + length)
        position += length
    return slots


def visible_rows(rows: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """True where a row at a position looks at a key: not ahead of it, not a window behind it."""
    distance = rows[:, None] - keys[None, :]
    return (distance >= 0) & (distance < (window or 1 << 40))


def dense_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[1, rows, heads, D]`, log-sum-exp `[1, heads, rows]`, attention; all float64.

    Logits x become softcap · tanh(x / softcap). A sink is a column of the softmax with no value.
    """
    q, k, v = query.double(), keys.double(), values.double()
    group = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(group, 1).transpose(2, 3) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(1, -1, logits.shape[2], 1)
        logits = torch.cat((logits, column), dim=-1)
    attention = logits.softmax(-1).nan_to_num(0.0)  # a row that sees nothing gets nothing
    attention = attention[..., : keys.shape[2]]
    out = attention @ v.repeat_interleave(group, 1)
    return out.transpose(1, 2), logits.logsumexp(-1), attention
