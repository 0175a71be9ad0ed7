"""ifkv: answer over documents that were prefilled once.

Documents' keys and values are computed offline, each alone behind a prefix. A request stitches
them together, finds the few tokens through which information flows to its answer, recomputes just
those, and answers through ordinary ``model.generate()``.

The method is InfoFlow KV (arXiv 2603.05353). Importing this package loads nothing heavy and
registers nothing; names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ifkv.version import __version__ as __version__

if TYPE_CHECKING:
    from ifkv.cache.extend import extend
    from ifkv.cache.stitch import stitch, stitch_many
    from ifkv.cache.stitched import StitchedCache
    from ifkv.cost import speedup_bound
    from ifkv.documents.cache import DocumentCache
    from ifkv.documents.images import ImageDocument
    from ifkv.documents.prefill import prefill_documents
    from ifkv.documents.source import Source
    from ifkv.documents.surrogate import SurrogateContext
    from ifkv.documents.surrogate_text import SURROGATE_TEXT
    from ifkv.errors import IfkvError
    from ifkv.generation.decode import generate_many
    from ifkv.generation.generate import generate
    from ifkv.models.hooks import observer
    from ifkv.patching.handle import PatchHandle, patch, unpatch
    from ifkv.session.answer import Answer
    from ifkv.session.conversation import Conversation
    from ifkv.session.session import Session
    from ifkv.steps.recompute import recompute, recompute_many
    from ifkv.steps.reorder import reorder
    from ifkv.steps.score import score, score_many
    from ifkv.steps.select import select

_HOME = {
    "SURROGATE_TEXT": "documents.surrogate_text",
    "Answer": "session.answer",
    "Conversation": "session.conversation",
    "DocumentCache": "documents.prefill",
    "IfkvError": "errors",
    "ImageDocument": "documents.images",
    "PatchHandle": "patching.handle",
    "Session": "session.session",
    "Source": "documents.source",
    "StitchedCache": "cache.stitched",
    "SurrogateContext": "documents.surrogate",
    "extend": "cache.extend",
    "generate": "generation.generate",
    "generate_many": "generation.decode",
    "observer": "models.hooks",
    "patch": "patching.handle",
    "prefill_documents": "documents.prefill",
    "recompute": "steps.recompute",
    "recompute_many": "steps.recompute",
    "reorder": "steps.reorder",
    "score": "steps.score",
    "score_many": "steps.score",
    "select": "steps.select",
    "speedup_bound": "cost",
    "stitch": "cache.stitch",
    "stitch_many": "cache.stitch",
    "unpatch": "patching.handle",
}

__all__ = [
    "SURROGATE_TEXT",
    "Answer",
    "Conversation",
    "DocumentCache",
    "IfkvError",
    "ImageDocument",
    "PatchHandle",
    "Session",
    "Source",
    "StitchedCache",
    "SurrogateContext",
    "extend",
    "generate",
    "generate_many",
    "observer",
    "patch",
    "prefill_documents",
    "recompute",
    "recompute_many",
    "reorder",
    "score",
    "score_many",
    "select",
    "speedup_bound",
    "stitch",
    "stitch_many",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ifkv' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ifkv.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
