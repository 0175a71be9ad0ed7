"""A session from end to end through the FlashInfer backend, with documents in a tiered store.

On the stand-in everywhere, on FlashInfer itself and in page-locked memory under `pytest -m gpu`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import ifkv
from flashinfer_standin import FlashInferStandIn
from ifkv.backends.flashinfer import FlashInferBackend
from ifkv.store import DiskStore, MemoryStore, TieredStore
from ifkv.testing import assert_within_floor, tiny_model, tiny_tokenizer, truth_model

TEXTS = ["The lamp is red.", "The door is green and old. " * 9, "It rains in the valley. " * 30]
QUESTION = "Which colour is the door?"
Open = Callable[..., ifkv.Session]


@pytest.fixture(params=["standin", pytest.param("real", marks=pytest.mark.gpu)])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Makes sessions over one disk, each with a model and fast memory of its own."""
    module: Any = FlashInferStandIn()
    if request.param == "real":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        module = pytest.importorskip("flashinfer")
    on_card = request.param == "real"

    def make(**options: Any) -> ifkv.Session:
        fast = MemoryStore(2**28, pin_memory=on_card)
        store = TieredStore(fast, DiskStore(tmp_path / "documents"))
        model = small_model().to("cuda" if on_card else "cpu")
        backend = FlashInferBackend(module)
        return ifkv.Session(model, tiny_tokenizer(), store=store, backend=backend, **options)

    return make


def small_model() -> PreTrainedModel:
    tokenizer = tiny_tokenizer()
    return tiny_model(
        dtype=torch.bfloat16,
        head_dim=128,
        num_heads=8,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=4096,
    )


def full_logits(model: Any, session: ifkv.Session) -> torch.Tensor:
    prompt = torch.tensor(session.format.prompt_ids(QUESTION))
    ids = torch.cat((session.context_ids().cpu(), prompt))[None]
    with torch.no_grad():
        logits: torch.Tensor = model(ids.to(model.device)).logits[0, -1].cpu()
    return logits


def test_all_of_it_is_a_full_prefill_from_memory_and_from_disk(opened: Open) -> None:
    first = opened()
    keys = first.add(TEXTS)
    again = opened()  # nothing of it in fast memory
    assert again.add(TEXTS) == keys
    plain = full_logits(first.model, first)
    truth = full_logits(truth_model(small_model()), first)
    for session in (first, again):
        ready = session.prepare(QUESTION, ratio=1)
        assert_within_floor(ready.logits.cpu(), plain, truth, what="logits", measure="rms")


def test_an_answer_is_the_same_again_and_in_pieces(opened: Open) -> None:
    session = opened()
    session.add(TEXTS)
    how: dict[str, Any] = {"ratio": 0.3, "max_new_tokens": 8}
    answer = session.ask(QUESTION, **how)
    assert {"stitch", "select", "recompute and prompt"} <= set(answer.timings)
    assert "".join(session.stream(QUESTION, **how)) == answer.text
    again = session.ask(QUESTION, **how)
    assert torch.equal(again.token_ids, answer.token_ids)
    assert torch.equal(again.slots, answer.slots)
    batch = session.ask_many([QUESTION, "Where does it rain?"], **how)
    assert [len(each.slots) for each in batch] == [len(answer.slots)] * 2


def test_conversations_and_eight_bits(opened: Open) -> None:
    session = opened(kv_dtype=torch.float8_e4m3fn)
    keys = session.add(TEXTS)
    assert session.ask(QUESTION, max_new_tokens=4).text is not None
    talk = opened().conversation(documents=keys[:2])
    first = talk.ask(QUESTION, max_new_tokens=4)
    talk.add([keys[2]])
    second = talk.ask("Where does it rain?", max_new_tokens=4)
    assert len(second.context_ids) > len(first.context_ids)
