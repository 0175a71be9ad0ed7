"""Patch a model in place, and restore it completely.

Belongs here: the handle, and the functions registered with transformers.
Not here: facts about models (`ifkv.models`) and passes (`ifkv.forward`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ifkv.utils.lazy import lazily

if TYPE_CHECKING:
    from ifkv.patching.handle import PatchHandle, handle_of, patch, unpatch

__all__ = ["PatchHandle", "handle_of", "patch", "unpatch"]

__getattr__ = lazily(
    __name__,
    {
        "PatchHandle": "handle",
        "handle_of": "handle",
        "patch": "handle",
        "unpatch": "handle",
    },
)
