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

if TYPE_CHECKING:
    from ifkv.answer import Answer
    from ifkv.batch_generation import generate_many
    from ifkv.batching import recompute_many, score_many
    from ifkv.conversation import Conversation
    from ifkv.cost import speedup_bound
    from ifkv.documents import DocumentCache, prefill_documents
    from ifkv.errors import IfkvError
    from ifkv.extending import extend
    from ifkv.generation import generate
    from ifkv.hooks import observer
    from ifkv.patching import PatchHandle, patch, unpatch
    from ifkv.recomputation import recompute
    from ifkv.reordering import reorder
    from ifkv.scoring import score
    from ifkv.selection import select
    from ifkv.session import Session
    from ifkv.source import Source
    from ifkv.stitched_cache import StitchedCache
    from ifkv.stitching import stitch, stitch_many

__version__ = "0.1.0"

_HOME = {
    "Answer": "answer",
    "Conversation": "conversation",
    "DocumentCache": "documents",
    "IfkvError": "errors",
    "PatchHandle": "patching",
    "Session": "session",
    "Source": "source",
    "StitchedCache": "stitched_cache",
    "extend": "extending",
    "generate": "generation",
    "generate_many": "batch_generation",
    "observer": "hooks",
    "patch": "patching",
    "prefill_documents": "documents",
    "recompute": "recomputation",
    "recompute_many": "batching",
    "reorder": "reordering",
    "score": "scoring",
    "score_many": "batching",
    "select": "selection",
    "speedup_bound": "cost",
    "stitch": "stitching",
    "stitch_many": "stitching",
    "unpatch": "patching",
}

__all__ = [
    "Answer",
    "Conversation",
    "DocumentCache",
    "IfkvError",
    "PatchHandle",
    "Session",
    "Source",
    "StitchedCache",
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
