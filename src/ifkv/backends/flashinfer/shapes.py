"""Sizes and dtypes of a planned call of FlashInfer."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ifkv.backends.spec import AttentionSpec


@dataclasses.dataclass(frozen=True)
class CallShape:
    """Sizes, dtypes and mask of a planned call; equal in all layers of most models."""

    heads: int
    kv_heads: int
    head_dim: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    page_size: int
    scaling: float
    window: int | None

    @classmethod
    def of(cls, query: Tensor, keys: Tensor, page_size: int, spec: AttentionSpec) -> CallShape:
        """Read them from the tensors of a layer, shaped as in the attention contract."""
        return cls(
            heads=query.shape[1],
            kv_heads=keys.shape[1],
            head_dim=query.shape[3],
            q_dtype=query.dtype,
            kv_dtype=keys.dtype,
            page_size=page_size,
            scaling=spec.scaling,
            window=spec.window,
        )

    @property
    def spec(self) -> AttentionSpec:
        """Return the spec of the layer."""
        return AttentionSpec(self.scaling, self.window)

    @property
    def group(self) -> int:
        """Return the number of query heads per key head."""
        return self.heads // self.kv_heads

    @property
    def plan_arguments(self) -> dict[str, Any]:
        """Return the arguments that every plan takes."""
        return {
            "num_qo_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "head_dim_qk": self.head_dim,
            "sm_scale": self.scaling,
            "q_data_type": self.q_dtype,  # float16 if left out
            "kv_data_type": self.kv_dtype,
        }
