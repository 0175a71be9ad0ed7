"""Sessions to converse with, answers made to order, and what a turn could change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ifkv
from ifkv.store import MemoryStore
from ifkv.testing import assert_bit_equal, tiny_model, tiny_tokenizer

TEXTS = ["The lamp is red.", "The door is green and old.", "It rains in the valley.", "A hill."]
EXACT = 1e-6  # first_logits are float32

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n\n' + "
    "message['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
# Writes no header before an answer that is not the last: what was asked changes afterwards.
FORGETFUL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' or loop.last %}"
    "{{ '<|im_start|>' + message['role'] + message['content'] + '<|im_end|>' }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


def make_session(template: str | None = "", **options: Any) -> ifkv.Session:
    tokenizer = tiny_tokenizer()
    kv_dtype = options.pop("kv_dtype", None)
    if template != "":
        tokenizer.chat_template = template
    options = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": 2048,
        **options,
    }
    model = tiny_model(**options)
    return ifkv.Session(model, tokenizer, store=MemoryStore(), kv_dtype=kv_dtype)


class Saying:
    """A logits processor: the answer is this text, and an end token behind it."""

    def __init__(self, session: ifkv.Session, text: str, stop: bool = True):
        self.ids = [*session.format.encode(text), *([session.tokenizer.eos_token_id] * stop)]
        self.spoken = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[min(self.spoken, len(self.ids) - 1)]] = 0
        self.spoken += 1
        return forced


def saying(session: ifkv.Session, text: str, stop: bool = True) -> dict[str, Any]:
    """Keywords that make the answer this text."""
    own = Saying(session, text, stop)
    return {"logits_processor": [own], "max_new_tokens": len(own.ids)}


def own_logits(session: ifkv.Session, answer: ifkv.Answer) -> Tensor:
    """The model's own logits over the ids that the answer followed."""
    model: Any = session.model
    with torch.no_grad():
        return model(torch.cat((answer.context_ids, answer.prompt_ids))[None]).logits[0, -1]


def state(chat: ifkv.Conversation) -> list[Tensor]:
    """All that a turn could change."""
    cache = chat._cache
    layers = [] if cache is None else cache.layers
    rows = [row for layer in layers for row in layer.rows(torch.arange(layer.length))]
    return [chat.token_ids, chat._recomputed, torch.tensor(chat._waiting_tokens), *rows]


def assert_unchanged(chat: ifkv.Conversation, before: list[Tensor]) -> None:
    after = state(chat)
    assert len(after) == len(before)
    for old, new in zip(before, after, strict=True):
        assert_bit_equal(new, old, what="state")
