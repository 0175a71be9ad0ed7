"""A session at ratio 1, whose answers are the model's own over context and prompt."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import GenerationConfig

import ifkv
from ifkv.store import MemoryStore
from ifkv.testing import tiny_model, tiny_tokenizer
from ways_of_asking import TEXTS


@pytest.fixture(scope="module")
def made() -> ifkv.Session:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=2048)
    session = ifkv.Session(model, tokenizer, store=MemoryStore(), ratio=1)
    session.add(TEXTS)
    return session


@pytest.fixture
def session(made: ifkv.Session) -> Iterator[ifkv.Session]:
    """With the model's own generation config as it was, afterwards."""
    own = made.model.generation_config
    made.model.generation_config = GenerationConfig()
    yield made
    made.model.generation_config = own
