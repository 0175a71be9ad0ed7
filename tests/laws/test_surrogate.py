"""Documents behind a surrogate context: what is kept, what is exact, what makes no difference."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import ifkv
from ifkv.documents import prefill
from ifkv.errors import InvalidInputError
from ifkv.store import key_of
from ifkv.testing import (
    FAMILIES,
    SLIDING_FAMILIES,
    assert_bit_equal,
    assert_close,
    dense_prefill,
    dense_stitched,
    shared_tiny_model,
    tiny_model,
)
from ifkv.testing.strategies import Request, token_ids
from scenario import EXACT, Scenario, assert_rows_equal, keys_of, prepared, scenarios, values_of

TEXTS = st.lists(token_ids(1, 8), min_size=1, max_size=3, unique_by=tuple)


def encode(s: Scenario, texts: Any, **options: Any) -> list[ifkv.DocumentCache]:
    """The request's documents behind prefix and texts; the model is patched."""
    return ifkv.prefill_documents(
        s.model, s.request.documents, prefix=s.request.prefix, surrogate=texts, **options
    )


def assert_same(
    made: list[ifkv.DocumentCache], wanted: list[ifkv.DocumentCache], *, bits: bool = True
) -> None:
    for one, other in zip(made, wanted, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        for name in ("keys", "values"):
            got, right = getattr(one, name), getattr(other, name)
            if bits:
                assert_bit_equal(got, right, what=name)
            else:
                assert_close(got, right, what=name, tolerance=EXACT)


@given(s=scenarios(), texts=TEXTS)
def test_they_are_the_mean_of_documents_encoded_behind_each_text(
    s: Scenario, texts: list[list[int]]
) -> None:
    """By the oracle, and by encoding them behind prefix and text as a longer prefix."""
    with ifkv.patch(s.model):
        documents = encode(s, texts)
        behind = [
            ifkv.prefill_documents(s.model, s.request.documents, prefix=[*s.request.prefix, *text])
            for text in texts
        ]
    for number, document in enumerate(documents):
        for name in ("keys", "values"):
            one_by_one = [getattr(made[number], name) for made in behind]
            naive = torch.stack(one_by_one).mean(dim=0)
            assert_close(getattr(document, name), naive, what=f"{name} by name", tolerance=EXACT)
    truths = [
        dense_stitched(s.model, [*s.request.prefix, *text], s.request.documents) for text in texts
    ]
    keys = sum(truth.keys_before_rope[:, :, truth.prefix_length :] for truth in truths) / len(texts)
    assert_close(
        torch.cat([document.keys for document in documents], dim=2),
        keys,
        what="keys by the oracle",
        tolerance=EXACT,
    )


@given(s=scenarios(), texts=TEXTS)
def test_what_they_are_and_what_they_share(s: Scenario, texts: list[list[int]]) -> None:
    """Their own tokens, positions and prefix; the prefix is that of documents encoded alone."""
    with prepared(s.model, s.request) as bench:
        documents = encode(s, texts)
        none = encode(s, None)
    context = documents[0].surrogate
    assert context is not None
    assert [text.tolist() for text in context.texts] == sorted(texts)
    for document, alone in zip(documents, bench.documents, strict=True):
        assert document.surrogate is context
        assert document.positions_taken == len(document) == len(alone)
        assert document.shape == alone.shape
        assert document.nbytes == alone.nbytes
        assert document.prefix is documents[0].prefix
        if alone.prefix is not None:
            assert document.prefix is not None
            assert document.prefix.surrogate is None
            assert_same([document.prefix], [alone.prefix])
    assert_same(none, bench.documents)
    assert all(document.surrogate is None for document in none)


@given(s=scenarios(), texts=TEXTS)
def test_layer_0_is_that_of_documents_encoded_alone(s: Scenario, texts: list[list[int]]) -> None:
    with prepared(s.model, s.request) as bench:
        cache = ifkv.stitch(s.model, encode(s, texts), order=s.order)
        alone = bench.stitch(s.order)
    assert_rows_equal(cache, alone, what="in layer 0", layers=slice(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_0_keeps_its_bits_in_half_precision(family: str, dtype: torch.dtype) -> None:
    """A mean of equal rows is taken in a wider dtype, so that it is not rounded."""
    model = shared_tiny_model(family, dtype=dtype)
    with ifkv.patch(model):
        alone = ifkv.prefill_documents(model, [[5, 6, 7], [8, 9]], prefix=[1])
        behind = ifkv.prefill_documents(
            model, [[5, 6, 7], [8, 9]], prefix=[1], surrogate=[[2, 3], [4], [9, 9, 9]]
        )
    for one, other in zip(behind, alone, strict=True):
        assert one.dtype == dtype
        assert_bit_equal(one.keys[0], other.keys[0], what="keys of layer 0")
        assert_bit_equal(one.values[0], other.values[0], what="values of layer 0")
        assert not torch.equal(one.values[1], other.values[1])


@given(s=scenarios(), texts=TEXTS)
def test_everything_recomputed_equals_full_prefill(s: Scenario, texts: list[list[int]]) -> None:
    with ifkv.patch(s.model):
        cache = ifkv.stitch(s.model, encode(s, texts), order=s.order)
        prefix = len(s.request.prefix)
        assert cache.exact_length == prefix
        rest = range(prefix, s.total)
        logits = ifkv.recompute(s.model, cache, rest, prompt_ids=s.request.prompt)
    full = dense_prefill(s.model, [*cache.token_ids.tolist(), *s.request.prompt])
    assert_rows_equal(cache, full, what="at ratio 1")
    assert_close(logits, full.logits[-1], what="logits", tolerance=EXACT)


@given(s=scenarios(min_slots=1), texts=TEXTS)
def test_unselected_rows_keep_their_bits(s: Scenario, texts: list[list[int]]) -> None:
    with ifkv.patch(s.model):
        cache = ifkv.stitch(s.model, encode(s, texts), order=s.order)
        before = cache.clone()
        ifkv.recompute(s.model, cache, s.slots)
    rest = [slot for slot in range(s.total) if slot not in s.slots]
    assert_bit_equal(keys_of(cache)[:, :, rest], keys_of(before)[:, :, rest], what="keys")
    assert_bit_equal(values_of(cache)[:, :, rest], values_of(before)[:, :, rest], what="values")


@given(s=scenarios(min_documents=2), texts=TEXTS, ratio=st.floats(0.01, 1))
def test_the_first_document_is_chosen_from_unless_it_was_encoded_alone(
    s: Scenario, texts: list[list[int]], ratio: float
) -> None:
    with prepared(s.model, s.request) as bench:
        behind = encode(s, texts)
        scores = torch.arange(s.total, 0, -1.0)  # the lowest slots first
        for mixed, start in (
            ([behind[0], *bench.documents[1:]], len(s.request.prefix)),
            ([bench.documents[0], *behind[1:]], None),
        ):
            cache = ifkv.stitch(s.model, mixed)
            first = cache.document_slices[0].stop if start is None else start
            assert cache.exact_length == cache.first_candidate == first
            assert cache.candidate_slots.tolist() == list(range(first, s.total))
            slots = ifkv.select(cache, scores, ratio=ratio)
            assert slots.tolist() == list(range(first, first + len(slots)))
            assert [rows.start for rows in cache.stale_slices] == [
                rows.start for rows in cache.document_slices if rows.start >= first
            ]


@given(s=scenarios(), texts=TEXTS, data=st.data())
def test_the_order_of_texts_changes_no_bit(
    s: Scenario, texts: list[list[int]], data: st.DataObject
) -> None:
    turned = data.draw(st.permutations(texts))
    with ifkv.patch(s.model):
        made = encode(s, texts)
        others = encode(s, turned)
        assert_same(others, made)
        assert key_of(others[0]) == key_of(made[0])


@given(s=scenarios(), texts=TEXTS, batch_tokens=st.integers(1, 30))
def test_neighbours_have_no_influence(
    s: Scenario, texts: list[list[int]], batch_tokens: int
) -> None:
    """Alone, side by side, in other batches, behind a prefix made before."""
    with ifkv.patch(s.model):
        together = encode(s, texts)
        others = encode(s, texts, batch_tokens=batch_tokens)
        known = together[0].prefix
        alone = [
            ifkv.prefill_documents(
                s.model,
                [ids],
                prefix=s.request.prefix if known is None else known,
                surrogate=together[0].surrogate,
            )[0]
            for ids in s.request.documents
        ]
    assert_same(others, together, bits=False)
    assert_same(alone, together, bits=False)
    assert all(document.prefix is known for document in alone)


# Queries of ministral3 grow with their position, which the text moves.
@pytest.mark.parametrize("family", [each for each in SLIDING_FAMILIES if each != "ministral3"])
def test_a_document_longer_than_the_window_forgets_the_text(family: str) -> None:
    """In layer l, tokens more than l windows behind the beginning are what they are alone.

    Up to the rounding of rotations, whose angles are those of other positions.
    """
    model = shared_tiny_model(family, sliding_window=5)
    ids = [list(range(10, 50))]
    with ifkv.patch(model):
        (alone,) = ifkv.prefill_documents(model, ids, prefix=[1])
        (behind,) = ifkv.prefill_documents(model, ids, prefix=[1], surrogate=[2, 3, 4, 5, 6, 7])
    assert not torch.equal(alone.values[1][:, 0], behind.values[1][:, 0])
    seen, depth = 0, len(alone.keys)
    for layer, kind in enumerate(
        getattr(model.config, "layer_types", ["sliding_attention"] * depth)
    ):
        assert_close(
            behind.values[layer][:, seen:],
            alone.values[layer][:, seen:],
            what=f"values of layer {layer}",
            tolerance=1e-5,
        )
        seen += 5 if kind == "sliding_attention" else len(alone)


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens that were prefilled with nothing before them, in order."""
    found: list[list[int]] = []
    own = prefill._prefill_alone

    def note(model: Any, handle: Any, ids: Tensor, identity: str) -> ifkv.DocumentCache:
        found.append(ids.tolist())
        return own(model, handle, ids, identity)

    monkeypatch.setattr(prefill, "_prefill_alone", note)
    return found


def test_texts_are_computed_once(prefilled: list[list[int]]) -> None:
    """For one surrogate context, by a model with these weights, behind this prefix."""
    model, other = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    context = ifkv.SurrogateContext.of(model, [[4], [2, 3]])

    def made(by: Any, prefix: list[int]) -> list[list[int]]:
        prefilled.clear()
        ifkv.prefill_documents(by, [[5, 6]], prefix=prefix, surrogate=context)
        return [ids for ids in prefilled if len(ids) > len(prefix)]

    with ifkv.patch(model), ifkv.patch(other):
        assert made(model, [1]) == [[1, 2, 3], [1, 4]]
        assert made(model, [1]) == []
        assert made(other, [1]) == [[1, 2, 3], [1, 4]]
        assert made(other, [2]) == [[2, 2, 3], [2, 4]]
        assert made(other, [2]) == []
        with torch.no_grad():
            other.model.layers[0].self_attn.k_proj.weight.mul_(2)
        assert made(other, [2]) == [[2, 2, 3], [2, 4]]


@pytest.mark.parametrize(
    ("surrogate", "reason"),
    [
        ([], "surrogate has no token; give the ids of a text, or None"),
        (torch.tensor([], dtype=torch.long), "surrogate has no token"),
        ([[]], "surrogate: text 0 is empty"),
        ([[1], []], "surrogate: text 1 is empty"),
        ("notes", "surrogate is the text 'notes'; give its token ids"),
        (["notes"], "surrogate: text 0 is a string; token ids are wanted"),
        ([1.5], "surrogate: text 0 holds .*float32; token ids are integers"),
        ([96, 97], "surrogate: text 0 holds token id 97"),
        ([[1], [-1]], "surrogate: text 1 holds token id -1"),
        ([[1, 2], [3], [1, 2]], "surrogate has the same text of 2 tokens twice"),
        (5, "surrogate is 5"),
        ({1: 2}, r"surrogate is \{1: 2\}"),
        ({1, 2}, "surrogate is {1, 2}; give the token ids of a text"),
        (iter([1, 2]), "surrogate is <list_iterator"),
    ],
)
def test_what_is_no_surrogate_is_refused(surrogate: Any, reason: str) -> None:
    model = shared_tiny_model("llama")
    with ifkv.patch(model), pytest.raises(InvalidInputError, match=reason):
        ifkv.prefill_documents(model, [[5, 6]], prefix=[1], surrogate=surrogate)


def test_what_is_too_long_behind_it_is_refused() -> None:
    model = tiny_model("llama", max_position_embeddings=20)
    with ifkv.patch(model):
        ifkv.prefill_documents(model, [[5] * 10], prefix=[1], surrogate=[[2] * 9, [3]])
        with pytest.raises(
            InvalidInputError,
            match="21 positions are needed for document 1 with its prefix and surrogate context",
        ):
            ifkv.prefill_documents(model, [[4], [5] * 11], prefix=[1], surrogate=[[2] * 9, [3]])


def test_one_text_may_be_given_in_any_form() -> None:
    model = shared_tiny_model("llama")
    ids = [[5, 6, 7]]
    forms: list[Any] = [
        [2, 3],
        (2, 3),
        [[2, 3]],
        torch.tensor([2, 3]),
        torch.tensor([[2, 3]]),
        [torch.tensor([2, 3])],
        torch.tensor([2, 3]).numpy(),
    ]
    with ifkv.patch(model):
        made = [ifkv.prefill_documents(model, ids, surrogate=form)[0] for form in forms]
        again = ifkv.prefill_documents(model, ids, surrogate=made[0].surrogate)[0]
    assert len({key_of(document) for document in [*made, again]}) == 1


def test_a_request_is_scored_selected_and_answered_as_any_other() -> None:
    model = shared_tiny_model("qwen2")
    request = Request([1], [[5, 6, 7, 8], [9, 10], [11] * 7], [3], [12, 13, 14])
    with prepared(model, request):
        documents = ifkv.prefill_documents(
            model, request.documents, prefix=request.prefix, surrogate=[[2, 3], [4]]
        )
        for order in ([0, 1, 2], [2, 1, 0]):
            cache = ifkv.stitch(model, documents, order=order)
            slots = ifkv.select(cache, ifkv.score(model, cache, request.query), ratio=0.5)
            assert int(slots[0]) >= cache.exact_length == 1
            ifkv.recompute(model, cache, slots)
            ids = ifkv.generate(model, cache, request.prompt, max_new_tokens=3, do_sample=False)
            assert len(ids) == 1 or ids.shape[-1] == 3
