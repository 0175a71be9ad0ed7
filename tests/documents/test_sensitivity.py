"""Sensitivities: against plain forwards, remembered, and what the selector makes of them."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ifkv
from ifkv import selectors
from ifkv.documents import sensitivity
from ifkv.documents.images import ImageRows
from ifkv.documents.sensitivity import (
    Sensitivities,
    foreign_tokens,
    measure_sensitivities,
    with_sensitivities,
)
from ifkv.errors import InvalidInputError, NotPatchedError
from ifkv.selectors import Request, sensitivity_aware
from ifkv.store import DiskStore, MemoryStore
from ifkv.testing import (
    assert_close,
    random_document,
    shared_tiny_model,
    tiny_model,
    tiny_tokenizer,
)
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
        documents = ifkv.prefill_documents(model, DOCUMENTS, prefix=prefix)
        found = measure_sensitivities(model, documents)
    for ids, got in zip(DOCUMENTS, found, strict=True):
        assert got.shape == (len(ids),)
        assert_close(got, by_definition(model, prefix, ids).float(), what=family, tolerance=1e-5)
        assert float(got.max()) > 1e-3, "nothing moves"


def test_a_document_keeps_all_else_it_has() -> None:
    prefix = random_document(1)
    surrogate = ifkv.SurrogateContext((torch.tensor([4, 5]),))
    row = torch.zeros(1, 4)
    images = ImageRows(torch.tensor([2]), row, None, torch.arange(5).expand(3, -1), "0" * 64)
    document = random_document(0, prefix=prefix, surrogate=surrogate)
    document = document.rebuilt(extent=9, images=images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "measure_sensitivities", lambda *_: [torch.ones(5)])
        (found,) = with_sensitivities(shared_tiny_model("llama"), [document])
    for field in dataclasses.fields(ifkv.DocumentCache):
        assert getattr(document, field.name) is not None or field.name == "sensitivity"
        if field.name != "sensitivity":
            assert getattr(found, field.name) is getattr(document, field.name)
    assert found.sensitivity is not None


@pytest.mark.parametrize("texts", [[7, 8], [[7, 8], [9]]])
def test_behind_a_surrogate_context_both_ways_measure_the_same(texts: Any) -> None:
    """Documents when they are made, and those of a cache that came without sensitivities."""
    model = shared_tiny_model("qwen2")
    ids = [torch.tensor(each) for each in DOCUMENTS[:2]]
    with ifkv.patch(model):
        behind = ifkv.prefill_documents(model, ids, prefix=[1], surrogate=texts)
        alone = ifkv.prefill_documents(model, ids, prefix=[1])
        wanted = [
            measure_sensitivities(model, [behind[0], alone[1]]),
            measure_sensitivities(model, [alone[0], behind[1]]),
        ]
        kept = Sensitivities()
        found = [
            kept.of(model, torch.tensor([1]), ids, [behind[0].surrogate, None]),
            kept.of(model, torch.tensor([1]), ids, [None, behind[1].surrogate]),
        ]
        assert not torch.equal(wanted[0][0], wanted[1][0])
        for got, right in zip(found, wanted, strict=True):
            for one, other in zip(got, right, strict=True):
                assert_close(one, other, what="sensitivities", tolerance=1e-6)
        cache = ifkv.stitch(model, [alone[0], behind[1]])
        assert cache.surrogates == [None, behind[1].surrogate]
        ifkv.extend(model, cache, [behind[0]])
        assert cache.surrogates[2] is behind[0].surrogate


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
        (got,) = measure_sensitivities(model, ifkv.prefill_documents(model, [long], prefix=[1]))
        assert float(got.max()) > 0
        full = ifkv.prefill_documents(model, [[5] * 39], prefix=[1])
        with pytest.raises(InvalidInputError, match="41 positions are needed"):
            measure_sensitivities(model, full)


def test_an_unpatched_model_is_refused() -> None:
    with pytest.raises(NotPatchedError):
        Sensitivities().of(tiny_model(), torch.tensor([1]), [torch.tensor([5])])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The documents that were measured, in order."""
    asked: list[list[int]] = []

    def measure(model: Any, documents: Any) -> list[Tensor]:
        asked.extend(document.token_ids.tolist() for document in documents)
        return [document.token_ids.sum().float().expand(len(document)) for document in documents]

    monkeypatch.setattr(sensitivity, "measure_sensitivities", measure)
    monkeypatch.setattr(sensitivity_aware, "_SENSITIVITIES", Sensitivities())
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
    layers = "layers=0.0-1.0,query=question"
    rule: Any = selectors.resolve(f"sensitivity-aware:sinks=0,power={power}")
    plain: Any = selectors.resolve(f"value-aware:{layers}")
    telling: Any = selectors.resolve("value-aware:query=question")
    request = Request(s.request.prompt, s.request.query)
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        norms, cost = plain.rank(s.model, cache, request)
        got, spent = rule.rank(s.model, cache, request)
        want = norms.clone()
        measured = measure_sensitivities(s.model, bench.documents)
        for part, index in list(zip(cache.document_slices, s.order, strict=True))[1:]:
            want[part] *= measured[index] ** power
        shown, _ = telling.rank(s.model, cache, request)
        selection = selectors.SensitivityAware(power=power).select(s.model, cache, request, 0.3)
    assert spent == cost
    assert torch.equal(got, want)
    assert selection.attention is not None
    assert torch.equal(selection.attention, shown), "what people are shown is not weighed"


def make_session(store: Any, **options: Any) -> ifkv.Session:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    return ifkv.Session(model, tokenizer, store=store, **options)


@pytest.mark.parametrize("codec", ["exact", "fp8"])
def test_a_session_that_goes_by_them_measures_them_once_and_for_good(
    tmp_path: Path, measured: list[list[int]], codec: str
) -> None:
    texts = ["The lamp is red and old.", "The door is green.", "It rains in the valley."]
    with DiskStore(tmp_path, codec=codec) as store:
        first = make_session(store, selector="sensitivity-aware")
        keys = first.add(texts)
        assert len(measured) == 3
        assert all(store.get(key, lazy=True).sensitivity is not None for key in keys)
        answer = first.ask("Which colour is the door?", ratio=0.3, max_new_tokens=1)
    with DiskStore(tmp_path, codec=codec) as store:
        again = make_session(store, selector="sensitivity-aware")
        again.add(texts)
        same = again.ask("Which colour is the door?", ratio=0.3, max_new_tokens=1)
        chat = again.conversation(keys[:2])
        chat.ask("Which colour is the door?", ratio=0.3, max_new_tokens=1)
        chat.add(keys[2:])
        turn = chat.ask("Where does it rain?", ratio=0.3, max_new_tokens=1)
    assert len(turn.slots) > 0
    assert torch.equal(same.slots, answer.slots)
    assert len(measured) == 3, "measured again, although the store has them"


def test_documents_stored_without_are_made_again_once(
    tmp_path: Path, measured: list[list[int]]
) -> None:
    texts = ["The lamp is red and old.", "The door is green."]
    for path in (tmp_path / "there", None):
        store = MemoryStore() if path is None else DiskStore(path)
        plain = make_session(store)
        keys = plain.add(texts)
        before = [store.get(key) for key in keys]
        session = make_session(store, selector="sensitivity-aware")
        assert session.add(texts) == keys
        assert session.prefilled == 2
        assert len(measured) == 2
        after = [store.get(key) for key in keys]
        for old, new in zip(before, after, strict=True):
            assert old.sensitivity is None
            assert new.sensitivity is not None
            assert torch.equal(old.keys, new.keys)
        assert plain.add(texts) == keys
        assert session.add(texts) == keys
        assert (plain.prefilled, session.prefilled, len(measured)) == (2, 2, 2)
        measured.clear()


def test_a_document_that_was_lost_is_measured_when_it_is_made_again(
    measured: list[list[int]],
) -> None:
    session = make_session(MemoryStore(), selector="sensitivity-aware")
    (key,) = session.add(["The lamp is red and old."])
    wanted = session.store.get(key).sensitivity
    session.store.delete(key)
    with pytest.warns(ifkv.errors.StoreWarning, match="prefilled again"):
        session.ask("Which colour is the lamp?", ratio=0.3, max_new_tokens=1)
    found = session.store.get(key).sensitivity
    assert wanted is not None
    assert found is not None
    assert torch.equal(found, wanted)
    assert len(measured) == 2


def test_documents_out_of_a_store_can_be_given_them(tmp_path: Path) -> None:
    model = shared_tiny_model("llama")
    with ifkv.patch(model), DiskStore(tmp_path / "a") as old, DiskStore(tmp_path / "b") as new:
        (made,) = ifkv.prefill_documents(model, [[5, 6, 7]], prefix=[1])
        (measured,) = with_sensitivities(model, [old.get(old.put(made), lazy=True)])
        found = new.get(new.put(measured))
        (wanted,) = measure_sensitivities(model, [made])
    assert found.sensitivity is not None
    assert torch.equal(found.sensitivity, wanted)
    assert torch.equal(found.keys, made.keys)


def test_others_do_not_pay_for_them(measured: list[list[int]]) -> None:
    session = make_session(MemoryStore())
    (key,) = session.add(["The lamp is red."])
    session.ask("Which colour is the lamp?", max_new_tokens=1)
    assert session.store.get(key).sensitivity is None
    assert measured == []


def test_they_come_with_the_documents_in_any_order_and_behind_others() -> None:
    model = shared_tiny_model("llama")
    with ifkv.patch(model):
        made = ifkv.prefill_documents(model, DOCUMENTS[:2], prefix=[1])
        one, two = with_sensitivities(model, made)
        cache = ifkv.stitch(model, [one, two], order=[1, 0])
        ifkv.extend(model, cache, [one, made[1]])
        found = [two.sensitivity, one.sensitivity, one.sensitivity, None]
        for each in (cache, cache.clone(), cache.choosing(torch.tensor([5]))):
            assert each.sensitivities == found


def test_known_ones_are_used_and_the_others_measured(measured: list[list[int]]) -> None:
    model, request = shared_tiny_model("llama"), Request([20, 21], [20, 21])
    rule = selectors.SensitivityAware(sinks=0)
    documents = [[5, 6, 7], [9, 3, 11], [4, 8, 15, 16]]
    with ifkv.patch(model):
        made = ifkv.prefill_documents(model, documents, prefix=[1])
        plain, known, bare = made
        known = dataclasses.replace(known, sensitivity=torch.tensor([0.0, 7.0, 0.0]))
        cache = ifkv.stitch(model, [plain, known, bare])
        norms = selectors.ValueAware(layers=rule.layers, query="question")
        before, _ = norms.rank(model, cache, request)
        got, _ = rule.rank(model, cache, request)
    assert measured == [[4, 8, 15, 16]]
    factors = torch.tensor([1.0] * 4 + [0.0, 7.0, 0.0] + [43.0] * 4)
    assert torch.equal(got, before * factors)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.ones(5, dtype=torch.float64),
        torch.ones(4),
        torch.tensor([1.0, 2.0, torch.nan, 1.0, 1.0]),
        torch.tensor([1.0, 2.0, -1.0, 1.0, 1.0]),
    ],
)
def test_stores_refuse_what_is_no_sensitivity(tmp_path: Path, wrong: Tensor) -> None:
    document = dataclasses.replace(random_document(length=5), sensitivity=wrong)
    for store in (MemoryStore(), DiskStore(tmp_path)):
        with pytest.raises(InvalidInputError, match=r"sensitivity is .* for 5 tokens"):
            store.put(document)
        assert len(list(store.keys())) == 0


def test_turns_of_a_conversation_and_batches_know_them() -> None:
    session = make_session(MemoryStore(), selector="sensitivity-aware")
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
