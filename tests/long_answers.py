"""A session whose answers can go on and on, for streams that are left before their end."""

from __future__ import annotations

from typing import Any

import ifkv
from ifkv.store import MemoryStore
from ifkv.testing import tiny_model, tiny_tokenizer


def session_over(texts: list[str]) -> ifkv.Session:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048)
    made = ifkv.Session(model, tokenizer, store=MemoryStore())
    made.add(texts)
    return made


def long_answer(session: ifkv.Session) -> dict[str, Any]:
    """Options that make the model say one word again and again.

    Some releases of transformers hand over whole words only, so there has to be an end to them.
    """
    word = session.tokenizer.encode("a ", add_special_tokens=False)
    return {
        "max_new_tokens": 400,
        "prefix_allowed_tokens_fn": lambda batch, ids: [word[len(ids) % len(word)]],
    }
