"""Turns and added documents against the dense oracle, for any model: families, ropes, windows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ifkv
from ifkv.cache.rollback import all_or_nothing
from ifkv.errors import FingerprintMismatchError, GeometryError, InvalidInputError
from ifkv.selectors import Request as Asked
from ifkv.selectors import names, resolve
from ifkv.testing import (
    DenseContext,
    DenseTrace,
    assert_bit_equal,
    assert_close,
    dense_prefill,
    dense_recompute,
    dense_stitched,
    shared_tiny_model,
)
from ifkv.testing.strategies import documents as lists_of_documents
from ifkv.testing.strategies import slot_subsets, token_ids
from scenario import EXACT, Scenario, assert_rows_equal, keys_of, prepared, scenarios, values_of

PLAIN = dict(family="llama", seed=1)


def followed(model, before: DenseTrace, ids, prefix, documents) -> DenseContext:
    """The oracle's context after a turn, with documents that were computed alone behind it."""
    alone = dense_stitched(model, prefix, documents)
    start, rows = len(prefix), slice(len(prefix), None)
    slices, at = [], len(ids)
    for own in alone.document_slices:
        slices.append(slice(own.start - start + at, own.stop - start + at))
    return DenseContext(
        token_ids=torch.cat((torch.tensor(ids), alone.token_ids[start:])),
        keys_before_rope=torch.cat(
            (before.keys_before_rope, alone.keys_before_rope[:, :, rows]), dim=2
        ),
        values=torch.cat((before.values, alone.values[:, :, rows]), dim=2),
        prefix_length=start,
        document_slices=tuple(slices),
    )


@given(
    s=scenarios(),
    further=lists_of_documents(max_documents=2, max_length=6),
    turn=token_ids(1, 6),
    last=token_ids(1, 4),
    data=st.data(),
)
def test_turns_and_further_documents_are_the_oracles(
    s: Scenario, further, turn, last, data
) -> None:
    """Stitch, repair some, a turn row by row; extend, repair some, answer: any model."""
    model, request = s.model, s.request
    cut = data.draw(st.integers(1, len(turn)))
    with prepared(model, request) as bench:
        cache = bench.stitch()
        ifkv.recompute(model, cache, s.slots, prompt_ids=turn[:cut])
        if turn[cut:]:  # the rest of the turn as decoding gives it
            cache.keep(turn[:cut])
            ifkv.recompute(model, cache, [], prompt_ids=turn[cut:])
        cache.keep(turn[cut:] or turn)
        ids = [*request.context, *turn]
        total = len(ids) + sum(map(len, further))
        chosen = data.draw(slot_subsets(total, first=len(ids)))
        first = dense_recompute(
            model, dense_stitched(model, request.prefix, request.documents), s.slots, turn
        )
        assert_rows_equal(cache, first, what="after a turn")

        more = ifkv.prefill_documents(model, further, prefix=request.prefix)
        slots = ifkv.extend(model, cache, more)
        assert slots.tolist() == list(range(len(ids), total))
        stitched = keys_of(cache).clone()
        got = ifkv.recompute(model, cache, chosen, prompt_ids=last)
    context = followed(model, first, ids, request.prefix, further)
    second = dense_recompute(model, context, chosen, last)
    assert cache.token_ids.tolist() == context.token_ids.tolist()
    assert cache.document_slices[-len(further) :] == list(context.document_slices)
    assert cache.positions.tolist() == list(range(total))
    assert_rows_equal(cache, second, what="after the second turn")
    assert_close(got, second.logits[-1], what="logits", tolerance=EXACT)
    kept = [slot for slot in range(total) if slot not in chosen]
    assert_bit_equal(keys_of(cache)[:, :, kept], stitched[:, :, kept], what="unselected rows")


@given(
    s=scenarios(), further=lists_of_documents(max_documents=2, max_length=6), turn=token_ids(1, 6)
)
def test_with_everything_recomputed_all_is_one_prefill(s: Scenario, further, turn) -> None:
    model, request = s.model, s.request
    with prepared(model, request) as bench:
        cache = bench.stitch()
        ifkv.recompute(model, cache, range(s.total), prompt_ids=turn)
        cache.keep(turn)
        more = ifkv.prefill_documents(model, further, prefix=request.prefix)
        slots = ifkv.extend(model, cache, more)
        got = ifkv.recompute(model, cache, slots, prompt_ids=request.prompt)
    ids = [*request.context, *turn, *(t for each in further for t in each), *request.prompt]
    whole = dense_prefill(model, ids)
    assert_rows_equal(cache, whole, what="of the whole history")
    assert_close(got, whole.logits[-1], what="logits", tolerance=EXACT)


@given(s=scenarios(), turn=token_ids(2, 6), data=st.data())
def test_what_raises_within_all_or_nothing_is_undone(s: Scenario, turn, data) -> None:
    model = s.model
    again = data.draw(slot_subsets(s.total, min_size=1))
    with prepared(model, s.request) as bench:
        cache = bench.recomputed(s.slots)
        before = (keys_of(cache).clone(), values_of(cache).clone(), cache.token_ids)
        more = ifkv.prefill_documents(model, [[3, 4, 5]], prefix=s.request.prefix)

        def fail() -> None:
            with all_or_nothing(cache) as save:
                ifkv.recompute(model, cache, [], prompt_ids=turn)
                cache.keep(turn)
                ifkv.extend(model, cache, more)
                save(torch.tensor(again))
                ifkv.recompute(model, cache, again, prompt_ids=turn)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
    assert cache.get_seq_length() == cache.context_length == s.total
    assert len(cache.document_slices) == len(cache.order) == len(s.request.documents)
    after = (keys_of(cache), values_of(cache), cache.token_ids)
    for old, new in zip(before, after, strict=True):
        assert_bit_equal(new, old, what="cache")


@pytest.mark.parametrize("name", names())
def test_every_selector_chooses_among_the_candidates(name: str) -> None:
    model = shared_tiny_model(**PLAIN)
    with ifkv.patch(model):
        first, second, third = ifkv.prefill_documents(
            model, [[5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15, 16, 17]], prefix=[1]
        )
        cache = ifkv.stitch(model, [first, second])
        ifkv.recompute(model, cache, [4], prompt_ids=[20, 21])
        cache.keep([20, 21])
        ifkv.extend(model, cache, [third])
        view = cache.choosing(torch.tensor([4, 7, 11, 12, 14]))
        request = Asked([30, 31], [30], None, None)
        for ratio, count in ((0, 0), (0.4, 2), (0.9, 4), (1, 5)):
            slots = resolve(name).select(model, view, request, ratio).slots.tolist()
            assert len(slots) == count
            assert set(slots) <= {4, 7, 11, 12, 14}
            assert slots == sorted(slots)


def test_what_cannot_be_extended_or_kept_is_refused() -> None:
    model, other = shared_tiny_model(**PLAIN), shared_tiny_model(family="llama", seed=2)
    with ifkv.patch(other):
        foreign = ifkv.prefill_documents(other, [[5, 6]], prefix=[1])
    with ifkv.patch(model):
        document, long = ifkv.prefill_documents(model, [[5, 6], [7] * 500], prefix=[1])
        elsewhere = ifkv.prefill_documents(model, [[5, 6]], prefix=[2])
        cache = ifkv.stitch(model, [document])
        before = (keys_of(cache).clone(), cache.token_ids)
        for message, kind, documents in (
            ("no documents", InvalidInputError, []),
            ("list of what", InvalidInputError, document),
            ("made by model", FingerprintMismatchError, foreign),
            ("one prefix", FingerprintMismatchError, elsewhere),
            (
                "max_position_embeddings",
                InvalidInputError,
                [document, document, long, document, long],
            ),
        ):
            with pytest.raises(kind, match=message):
                ifkv.extend(model, cache, documents)
        overlapping = ifkv.stitch(model, [document, document], geometry="hl-tp")
        with pytest.raises(GeometryError, match="extend needs"):
            ifkv.extend(model, overlapping, [document])
        with pytest.raises(GeometryError, match="keep"):
            overlapping.keep([])
        with pytest.raises(InvalidInputError, match="2 tokens were given for the 0 rows"):
            cache.keep([1, 2])
        assert_bit_equal(keys_of(cache), before[0], what="keys")
        assert torch.equal(cache.token_ids, before[1])
        ifkv.recompute(model, cache, [], prompt_ids=[9])
        with pytest.raises(InvalidInputError, match="have been appended"):
            ifkv.extend(model, cache, [document])
