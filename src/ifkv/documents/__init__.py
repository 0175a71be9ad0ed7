"""Documents: token ids in, keys and values behind a prefix out.

Belongs here: `DocumentCache`, its prefill, sensitivities, the cutting of long texts.
Not here: keeping documents (`ifkv.store`) and placing them in a request (`ifkv.cache`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ifkv.utils.lazy import lazily

if TYPE_CHECKING:
    from ifkv.documents.cache import DocumentCache
    from ifkv.documents.images import ImageDocument, ImageRows
    from ifkv.documents.prefill import prefill_documents
    from ifkv.documents.surrogate import SurrogateContext

__all__ = [
    "DocumentCache",
    "ImageDocument",
    "ImageRows",
    "SurrogateContext",
    "prefill_documents",
]

__getattr__ = lazily(
    __name__,
    {
        "DocumentCache": "cache",
        "ImageDocument": "images",
        "ImageRows": "images",
        "SurrogateContext": "surrogate",
        "prefill_documents": "prefill",
    },
)
