"""Sessions over a tiny model and three texts, and what a full prefill says of them."""

from __future__ import annotations

from typing import Any

import torch

import ifkv
from ifkv.store import MemoryStore
from ifkv.testing import tiny_model, tiny_tokenizer

TEXTS = ["The lamp is red.", "The door is green and old.", "It rains in the valley."]
QUESTION = "Which colour is the door?"


def make_session(**options: Any) -> ifkv.Session:
    tokenizer = tiny_tokenizer()
    model = tiny_model(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=2048
    )
    return ifkv.Session(model, tokenizer, **{"store": MemoryStore(), **options})


def full_logits(session: ifkv.Session) -> torch.Tensor:
    prompt = torch.tensor(session.format.prompt_ids(QUESTION))
    ids = torch.cat((session.context_ids(), prompt))[None]
    model: Any = session.model
    with torch.no_grad():
        return model(ids).logits[0, -1]
