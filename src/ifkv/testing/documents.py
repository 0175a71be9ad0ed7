"""Random documents for tests of stores, without a model."""

from __future__ import annotations

import torch

from ifkv.documents.cache import DocumentCache
from ifkv.documents.surrogate import SurrogateContext


def random_document(
    seed: int = 0,
    *,
    length: int = 5,
    prefix: DocumentCache | None = None,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    kv_heads: int = 2,
    head_dim: int = 4,
    fingerprint: str = "0" * 32,
    sensitivity: bool = False,
    surrogate: SurrogateContext | None = None,
) -> DocumentCache:
    """Build a document of random tokens and rows; the same seed builds the same document.

    Args:
        seed: Seed of tokens and rows.
        length: Number of tokens.
        prefix: Prefix that it claims to have been encoded after.
        dtype: Dtype of the rows.
        layers: Number of decoder layers.
        kv_heads: Number of key and value heads.
        head_dim: Width of a head.
        fingerprint: Fingerprint of the model it claims to be of.
        sensitivity: True to give it sensitivities.
        surrogate: Surrogate context that it claims to have been encoded behind.

    Returns:
        A document cache that no model can use.
    """
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, 50_000, (length,), generator=generator)
    rows = torch.randn(2, layers, kv_heads, length, head_dim, generator=generator).to(dtype)
    prefix_ids = token_ids[:0] if prefix is None else prefix.token_ids
    measured = torch.rand(length, generator=generator) if sensitivity else None
    return DocumentCache(
        token_ids,
        prefix_ids,
        rows[0],
        rows[1],
        fingerprint,
        prefix,
        measured,
        surrogate=surrogate,
    )
