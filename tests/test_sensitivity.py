"""Sensitivities: against plain forwards, remembered, and what the selector makes of them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ifkv
from ifkv import selectors, sensitivity
from ifkv.errors import InvalidInputError, NotPatchedError
from ifkv.selectors import Request
from ifkv.sensitivity import Sensitivities, foreign_tokens, measure_sensitivities
from ifkv.store import MemoryStore
from ifkv.testing import assert_close, shared_tiny_model, tiny_model, tiny_tokenizer
from scenario import Scenario, prepared, scenarios

DOCUMENTS = [[5, 6, 7, 8], [9, 3, 5], [5, 6, 7, 8]]


def native_values(model: Any, before: list[int], ids: list[int]) -> Tensor:
    """Values of a document's rows in a forward of the whole text, ``[layers, heads, n, dim]``."""
    with torch.no_grad():
        cache = model(torch.tensor([[*before, *ids]]), use_cache=True).past_key_values
    return torch.stack([layer.values[0, :, len(before) :] for layer in cache.layers])


def by_definition(model: Any, prefix: list[int], ids: list[int]) -> Tensor:
    foreign = foreign_tokens(model.config.vocab_size)
    alone, moved = (native_values(model, [*prefix, *extra], ids) for extra in ([], foreign))
    scores = torch.zeros(len(ids), dtype=alone.dtype)
    for old, new in zip(alone, moved, strict=True):
        size = old.square().sum(dim=(0, 2)).mean().sqrt()
        for token in range(len(ids)):
            scores[token] += (new - old)[:, token].norm() / size / len(alone)
    return scores


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
@pytest.mark.parametrize("prefix", [[], [1, 2]])
def test_they_are_what_two_plain_forwards_say(family: str, prefix: list[int]) -> None:
    model = shared_tiny_model(family)
    with ifkv.patch(model):
        found = measure_sensitivities(model, prefix, DOCUMENTS)
    for ids, got in zip(DOCUMENTS, found, strict=True):
        assert got.shape == (len(ids),)
        assert_close(got, by_definition(model, prefix, ids).float(), what=family, tolerance=1e-5)
        assert float(got.max()) > 1e-3, "nothing moves"


def test_foreign_tokens_are_ids_of_the_vocabulary_and_always_the_same() -> None:
    for vocabulary in (7, 1000, 151_936):
        ids = foreign_tokens(vocabulary)
        assert ids == foreign_tokens(vocabulary)
        assert all(0 <= each < vocabulary for each in ids)
    assert len(set(foreign_tokens(151_936))) == sensitivity.FOREIGN_TOKENS


def test_where_positions_are_few_the_foreign_text_is_shorter() -> None:
    model = tiny_model("llama", max_position_embeddings=40)
    long = [5] * 30
    with ifkv.patch(model):
        (got,) = measure_sensitivities(model, [1], [long])
        assert float(got.max()) > 0
        with pytest.raises(InvalidInputError, match="41 positions are needed"):
            measure_sensitivities(model, [1], [[5] * 39])


def test_an_unpatched_model_is_refused() -> None:
    with pytest.raises(NotPatchedError):
        Sensitivities().of(tiny_model(), torch.tensor([1]), [torch.tensor([5])])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The documents that were measured, in order."""
    asked: list[list[int]] = []

    def measure(model: Any, prefix: Any, documents: Any) -> list[Tensor]:
        asked.extend(list(ids) for ids in documents)
        return [torch.tensor([float(sum(ids))] * len(ids)) for ids in documents]

    monkeypatch.setattr(sensitivity, "measure_sensitivities", measure)
    return asked


def test_a_document_is_measured_once_for_a_model_and_a_prefix(measured: list[list[int]]) -> None:
    kept, ids = Sensitivities(), [torch.tensor(each) for each in DOCUMENTS]
    one, other = tiny_model(seed=0), tiny_model(seed=1)
    with ifkv.patch(one), ifkv.patch(other):
        first = kept.of(one, torch.tensor([1]), ids)
        again = kept.of(one, torch.tensor([1]), ids[::-1])
        assert measured == DOCUMENTS[:2]
        assert [each.tolist() for each in first] == [each.tolist() for each in again[::-1]]
        kept.of(one, torch.tensor([2]), ids[:1])
        kept.of(other, torch.tensor([1]), ids[:1])
    assert measured == [*DOCUMENTS[:2], DOCUMENTS[0], DOCUMENTS[0]]


def test_the_longest_unused_are_forgotten(measured: list[list[int]]) -> None:
    kept, model = Sensitivities(limit=7), tiny_model()
    with ifkv.patch(model):
        for ids in ([5, 6, 7, 8], [9, 3, 5], [5, 6, 7, 8], [4, 4], [5, 6, 7, 8], [9, 3, 5]):
            (got,) = kept.of(model, torch.tensor([1]), [torch.tensor(ids)])
            assert got.tolist() == [float(sum(ids))] * len(ids)
    assert measured == [[5, 6, 7, 8], [9, 3, 5], [4, 4], [9, 3, 5]]


def test_more_than_is_kept_is_still_answered(measured: list[list[int]]) -> None:
    kept, model = Sensitivities(limit=1), tiny_model()
    ids = [torch.tensor(each) for each in ([5, 6], [7, 8])]
    with ifkv.patch(model):
        assert [each.tolist() for each in kept.of(model, torch.tensor([1]), ids)] == [
            [11.0, 11.0],
            [15.0, 15.0],
        ]


def test_threads_that_want_the_same_measure_it_once(measured: list[list[int]]) -> None:
    kept, model = Sensitivities(), tiny_model()
    with ifkv.patch(model):
        threads = [
            threading.Thread(
                target=kept.of, args=(model, torch.tensor([1]), [torch.tensor([5, 6])])
            )
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert measured == [[5, 6]]


@given(s=scenarios(), power=st.sampled_from([0.5, 1.0, 2.0]))
def test_the_selector_weighs_what_is_read_by_sensitivity(s: Scenario, power: float) -> None:
    layers = "layers=0.2-0.7,query=question"
    rule: Any = selectors.resolve(f"sensitivity-aware:sinks=0,power={power}")
    plain: Any = selectors.resolve(f"value-aware:{layers}")
    request = Request(s.request.prompt, s.request.query)
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        norms, cost = plain.rank(s.model, cache, request)
        got, spent = rule.rank(s.model, cache, request)
        want = norms.clone()
        for part, index in list(zip(cache.document_slices, s.order, strict=True))[1:]:
            (moved,) = measure_sensitivities(
                s.model, s.request.prefix, [s.request.documents[index]]
            )
            want[part] *= moved**power
        selection = selectors.SensitivityAware(power=power).select(s.model, cache, request, 0.3)
    assert spent == cost
    assert torch.equal(got, want)
    assert selection.attention is not None
    assert torch.equal(selection.attention, norms), "what is shown to people is not weighed"


def test_turns_of_a_conversation_and_batches_know_them() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    session = ifkv.Session(model, tokenizer, store=MemoryStore(), selector="sensitivity-aware")
    first = session.add(["The lamp is red and old.", "The door is green."])
    more = session.add(["The boat is blue. It is new."])
    chat = session.conversation(first)
    one = chat.ask("Which colour is the door?", ratio=0.3, max_new_tokens=2)
    chat.add(more)
    two = chat.ask("And the boat?", ratio=0.5, max_new_tokens=2)
    assert len(one.slots) > 0
    assert len(two.slots) > 0
    alone = session.ask("Which colour is the door?", documents=first, ratio=0.3, max_new_tokens=2)
    (many,) = session.ask_many(
        ["Which colour is the door?"], documents=first, ratio=0.3, max_new_tokens=2
    )
    for other in (one, many):
        assert torch.equal(other.slots, alone.slots)
