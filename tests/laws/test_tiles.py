"""Scattered rows and ragged documents on the reference backend, against dense masks.

The sizes of tiles are made tiny, so that a few dozen rows are cut in every possible way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ifkv
from dense_attention import Heads, dense_attention, heads, often, scattered_slots, visible_rows
from ifkv.backends import reference, tiles
from ifkv.backends.reference import ReferenceBackend
from ifkv.backends.spec import AttentionSpec
from ifkv.backends.tiles import cut_into_tiles
from ifkv.testing import assert_bit_equal, assert_close, dense_recompute, dense_stitched
from scenario import EXACT, Scenario, assert_rows_equal, keys_of, poison, prepared, scenarios

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32]
windows = st.none() | st.integers(1, 40)


@contextmanager
def tile_sizes(rows: int, span: int, run: int) -> Iterator[None]:
    with (
        patch.object(tiles, "TILE_ROWS", rows),
        patch.object(tiles, "TILE_SPAN", span),
        patch.object(tiles, "RUN_ROWS", run),
    ):
        yield


sizes = st.tuples(st.integers(1, 9), st.integers(1, 30), st.integers(1, 9))


def tolerance(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 1e-5


@often
@given(slots=scattered_slots(), size=sizes)
def test_tiles_cover_every_row_once_within_their_bounds(
    slots: list[int], size: tuple[int, int, int]
) -> None:
    with tile_sizes(*size):
        found = cut_into_tiles(slots)
    rows, span, run = size
    assert [row for tile in found for row in range(tile.start, tile.stop)] == list(
        range(len(slots))
    )
    members = set(slots)
    for tile in found:
        own = slots[tile.start : tile.stop]
        assert (tile.first, tile.last) == (own[0], own[-1])
        assert tile.adjacent == (own == list(range(own[0], own[-1] + 1)))
        whole_run = tile.adjacent and {own[0] - 1, own[-1] + 1}.isdisjoint(members)
        if not (whole_run and len(own) >= run):
            assert len(own) <= rows
            assert tile.last - tile.first < span or len(own) == 1
    # A long run is a tile of its own, however it lies.
    starts = [slot for slot in slots if slot - 1 not in members]
    for start in starts:
        stop = next(slot for slot in range(start, slots[-1] + 2) if slot not in members)
        if stop - start >= run:
            assert (start, stop - 1) in [(tile.first, tile.last) for tile in found]


def test_tiles_of_the_sizes_in_use() -> None:
    assert cut_into_tiles([]) == ()
    every_other = list(range(0, 600, 2))
    assert [t.stop - t.start for t in cut_into_tiles(every_other)] == [128, 128, 44]
    far = [0, 1, 2047, 2048, 5000]
    assert [(t.first, t.last) for t in cut_into_tiles(far)] == [
        (0, 2047),
        (2048, 2048),
        (5000,) * 2,
    ]
    run = [3, *range(10, 500), 700]
    assert [(t.start, t.stop) for t in cut_into_tiles(run)] == [(0, 1), (1, 491), (491, 492)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@often
@given(
    slots=scattered_slots(),
    size=sizes,
    shape=heads(),
    window=windows,
    behind=st.integers(0, 9),
)
def test_scattered_rows_equal_a_dense_mask(
    dtype: torch.dtype,
    slots: list[int],
    size: tuple[int, int, int],
    shape: Heads,
    window: int | None,
    behind: int,
) -> None:
    """And slots behind the last row, in use or not, are never read."""
    used = slots[-1] + 1
    query, keys, values = shape.draw(len(slots), used + behind, dtype)
    keys[:, :, used:], values[:, :, used:] = float("nan"), float("nan")
    rows = torch.tensor(slots)
    backend = ReferenceBackend()
    with tile_sizes(*size):
        plan = backend.plan_requests([rows], [used], CPU)
        got = backend.attend_requests(query, [keys], [values], plan, AttentionSpec(0.4, window))
    visible = visible_rows(rows, torch.arange(used), window)
    expected, _, _ = dense_attention(query, keys[:, :, :used], values[:, :, :used], visible, 0.4)
    assert got.dtype == dtype
    assert_close(got, expected, what="rows", tolerance=tolerance(dtype))


@often
@given(slots=scattered_slots(), size=sizes, shape=heads(), window=windows)
def test_bfloat16_rows_are_rounded_and_no_more(
    slots: list[int], size: tuple[int, int, int], shape: Heads, window: int | None
) -> None:
    used = slots[-1] + 1
    query, keys, values = shape.draw(len(slots), used, torch.bfloat16)
    rows = torch.tensor(slots)
    backend = ReferenceBackend()
    with tile_sizes(*size):
        plan = backend.plan_requests([rows], [used], CPU)
        got = backend.attend_requests(query, [keys], [values], plan, AttentionSpec(0.4, window))
    visible = visible_rows(rows, torch.arange(used), window)
    expected, _, _ = dense_attention(query, keys, values, visible, 0.4)
    # 8 bits: probabilities, both parts and the merged output are rounded once each.
    assert_close(got, expected, what="rows", tolerance=4 * 2**-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@often
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    prefix=st.integers(0, 6),
    shape=heads(),
    window=windows,
)
def test_ragged_documents_equal_a_dense_mask(
    dtype: torch.dtype, lengths: list[int], prefix: int, shape: Heads, window: int | None
) -> None:
    total = sum(lengths)
    query, keys, values = shape.draw(total, prefix + total, dtype)
    backend = ReferenceBackend()
    got = backend.attend_documents(
        query,
        keys[:, :, prefix:],
        values[:, :, prefix:],
        keys[:, :, :prefix],
        values[:, :, :prefix],
        backend.plan_documents(tuple(lengths), prefix, CPU),
        AttentionSpec(0.4, window),
    )
    owner = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)])
    local = torch.tensor([prefix + j for length in lengths for j in range(length)])
    positions = torch.cat([torch.arange(prefix), local])
    visible = visible_rows(local, positions, window)
    visible[:, prefix:] &= owner[:, None] == owner[None, :]
    expected, _, _ = dense_attention(query, keys, values, visible, 0.4)
    assert_close(got, expected, what="rows", tolerance=tolerance(dtype))


def at_tile_sizes(s: Scenario, size: tuple[int, int, int]) -> tuple[ifkv.StitchedCache, Tensor]:
    with tile_sizes(*size), prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order)
        logits = ifkv.recompute(s.model, cache, s.slots, prompt_ids=s.request.prompt)
    assert logits is not None
    return cache, logits


@given(s=scenarios(), size=sizes)
def test_whole_models_with_tiny_tiles_equal_the_oracle(
    s: Scenario, size: tuple[int, int, int]
) -> None:
    cache, logits = at_tile_sizes(s, size)
    context = dense_stitched(s.model, s.request.prefix, s.request.documents, s.order)
    truth = dense_recompute(s.model, context, s.slots, s.request.prompt)
    assert_rows_equal(cache, truth, what="after recompute")
    assert_close(logits, truth.logits[-1], what="logits", tolerance=EXACT)


@given(s=scenarios(min_slots=1), size=sizes)
def test_laws_10_and_11_with_tiny_tiles(s: Scenario, size: tuple[int, int, int]) -> None:
    with tile_sizes(*size), prepared(s.model, s.request) as bench:
        expected, cache = bench.recomputed(s.slots, s.order), bench.stitch(s.order)
        poison(cache, s.slots, float("nan"))
        poison(cache, slice(s.slots[-1] + 1, None), float("nan"))
        ifkv.recompute(s.model, cache, s.slots)
    seen = slice(0, s.slots[-1] + 1)
    assert_bit_equal(keys_of(cache)[:, :, seen], keys_of(expected)[:, :, seen], what="keys seen")


@pytest.mark.parametrize("window", [None, 3, 50])
def test_a_row_alone_is_one_call_without_a_mask(window: int | None) -> None:
    shape = Heads(kv_heads=2, group=2, head_dim=8, seed=0)
    query, keys, values = shape.draw(1, 40, torch.float64)
    backend, slot = ReferenceBackend(), 33
    plan = backend.plan_requests([torch.tensor([slot])], [40], CPU)
    with patch.object(reference, "attend_quantized", wraps=reference.attend_quantized) as calls:
        out = backend.attend_requests(query, [keys], [values], plan, AttentionSpec(0.3, window))
    assert [call.kwargs for call in calls.call_args_list] == [{}]
    visible = visible_rows(torch.tensor([slot]), torch.arange(40), window)
    expected, _, _ = dense_attention(query, keys, values, visible, 0.3)
    assert_close(out, expected, what="attention", tolerance=1e-12)
