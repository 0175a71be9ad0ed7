"""FlashInfer (2501.01005) as an attention backend, for CUDA."""

from __future__ import annotations

from ifkv.backends.flashinfer.backend import FlashInferBackend

__all__ = ["FlashInferBackend"]
