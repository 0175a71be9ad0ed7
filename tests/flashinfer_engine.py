"""FlashInfer or its stand-in, with a device and a dtype, and the oracle it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ifkv.backends.flashinfer import FlashInferBackend
from ifkv.testing import assert_close

WORKSPACE = 64 * 2**20


@dataclass(frozen=True)
class Engine:
    """FlashInfer or a stand-in, and what it can compute with.

    Attributes:
        strict: The module to call wrongly, with its refusals.
        module: The module to compute with; the same one, but for a relaxed stand-in.
        device: Where.
        dtype: Of queries, keys and values.
        head_dim: Of queries, keys and values.
        tolerance: Between its result and the dense oracle's, relative to 1 + |expected|.
    """

    strict: Any
    module: Any
    device: torch.device
    dtype: torch.dtype
    head_dim: int
    tolerance: float

    def backend(self, mask: str = "positions") -> FlashInferBackend:
        return FlashInferBackend(self.module, mask=mask, workspace_bytes=WORKSPACE)

    def random(self, *shape: int, seed: int) -> Tensor:
        """Values of about one, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(self.dtype).to(self.device)

    def equal(self, actual: Tensor, expected: Tensor, what: str) -> None:
        assert_close(actual.cpu().double(), expected, what=what, tolerance=self.tolerance)


def dense(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention from its formula, in float64 on the CPU.

    Args:
        query: `[heads, rows, D]`.
        keys: `[kv_heads, n, D]`.
        values: `[kv_heads, n, D]`.
        visible: Bool `[rows, n]`.
        scaling: Factor on the logits.

    Returns:
        `[rows, heads, D]` and natural log-sum-exp `[rows, heads]`.
    """
    group = query.shape[0] // keys.shape[0]
    q, k, v, visible = (x.cpu() for x in (query, keys, values, visible))
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    logits = (q.double() @ k.mT * scaling).masked_fill(~visible, float("-inf"))
    return (logits.softmax(-1) @ v).transpose(0, 1), logits.logsumexp(-1).T


def causal(slots: Sequence[int], length: int, window: int | None = None) -> Tensor:
    """Rows at slots see slots up to their own, `window` of them."""
    rows, keys = torch.as_tensor(slots)[:, None], torch.arange(length)
    visible = keys <= rows
    return visible if window is None else visible & (keys > rows - window)
