"""Sessions over one tiny model whose documents have sources."""

from __future__ import annotations

from typing import Any

import ifkv
from ifkv.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(vocab_size=len(TOKENIZER))
TEXTS = ["The lamp is red.", "The door is green.", "It rains."]
FERRY = "# The ferry\n\nIt leaves at two.\n\nIt takes an hour."


def make_session(store: Any, **options: Any) -> ifkv.Session:
    return ifkv.Session(MODEL, TOKENIZER, store=store, **options)
