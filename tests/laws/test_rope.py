"""Laws 18-22: where keys are put, and that this is all that happens to them."""

import dataclasses
import importlib
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import ifkv
from ifkv.cache import inputs as stitch_plan
from ifkv.cache import layout as positions
from ifkv.models.rope import rotate
from ifkv.patching import handle_of
from ifkv.testing import assert_bit_equal, assert_close, rope_types, tiny_model
from scenario import EXACT, Bench, Scenario, keys_of, prepared, scenarios, values_of
from tried import FAMILIES

GEOMETRIES = st.sampled_from(positions.GEOMETRIES)


def parts_of(bench: Bench, cache: ifkv.StitchedCache) -> list[ifkv.DocumentCache]:
    """Prefix and documents in the cache's order."""
    documents = [bench.documents[i] for i in cache.order]
    return ([documents[0].prefix] if documents[0].prefix is not None else []) + documents


def before_rope(bench: Bench, cache: ifkv.StitchedCache) -> Tensor:
    return torch.cat([part.keys for part in parts_of(bench, cache)], dim=2)


def turn_back(model: PreTrainedModel, cache: ifkv.StitchedCache) -> Tensor:
    """The cache's keys with the rotation undone by its inverse."""
    cos, sin = handle_of(model).rope.cos_sin(cache.positions, torch.float64)
    size = cos.square() + sin.square()  # attention scaling squared, and rounding
    return rotate(keys_of(cache), cos / size, -sin / size)


def upstream_rotation(model: PreTrainedModel, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The family's own `apply_rotary_pos_emb`, `[1, heads, n, head_dim]`."""
    module = importlib.import_module(type(model).__module__)
    return module.apply_rotary_pos_emb(x, x, cos[None], sin[None])[1]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_rotate_is_bit_equal_to_the_familys_own(family: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for rope in set(rope_types(family)) - {"dynamic", "longrope"}:
        model = tiny_model(family, rope=rope, dtype=dtype, max_position_embeddings=1 << 20)
        where = torch.randint(1 << 20, (500,), generator=generator)
        where[:50] = torch.arange(50)
        x = torch.randn(1, 3, len(where), 8, generator=generator, dtype=torch.float64).to(dtype)
        with ifkv.patch(model) as handle:
            cos, sin = handle.rope.cos_sin(where, dtype)
        expected = upstream_rotation(model, x, cos, sin)
        assert_bit_equal(rotate(x, cos, sin), expected, what=f"{rope}: rotated")
        # Into memory that is not contiguous, as stitching does.
        out = torch.full((1, 3, 2 * len(where), 8), float("nan"), dtype=dtype)[:, :, ::2]
        assert rotate(x, cos, sin, out=out) is out
        assert_bit_equal(out, expected, what=f"{rope}: rotated into place")


@pytest.mark.parametrize("geometry", positions.GEOMETRIES)
@given(s=scenarios())
def test_layouts_of_the_four_geometries(geometry: str, s: Scenario) -> None:
    """Against the table of the method, slot by slot."""
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order, geometry)
    prefix = len(s.request.prefix)
    lengths = [len(s.request.documents[i]) for i in s.order]
    expected, slot = list(range(prefix)), prefix
    for length in lengths:
        start = {"global": slot, "tl-tp": s.total - length, "hl-hp": prefix, "hl-tp": prefix}
        expected += range(start[geometry], start[geometry] + length)
        slot += length
    assert cache.positions.tolist() == expected
    assert cache.query_position == (prefix + max(lengths) if geometry == "hl-hp" else s.total)
    assert [rows.stop - rows.start for rows in cache.document_slices] == lengths
    assert (cache.prefix_length, cache.geometry, cache.order) == (prefix, geometry, s.order)
    ids = s.request.prefix + [t for i in s.order for t in s.request.documents[i]]
    assert cache.token_ids.tolist() == ids


@given(s=scenarios(), geometry=GEOMETRIES)
def test_law_18_turning_keys_back_gives_the_documents_keys(s: Scenario, geometry: str) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order, geometry)
        got = turn_back(s.model, cache)
    assert_close(got, before_rope(bench, cache), what="keys turned back", tolerance=EXACT)


@given(s=scenarios(), geometry=GEOMETRIES)
def test_law_18_moving_stitched_keys_equals_stitching_in_that_order(
    s: Scenario, geometry: str
) -> None:
    """From any geometry and order straight to the global one, and over a detour back again."""
    with prepared(s.model, s.request) as bench:
        origin, goal = bench.stitch(geometry=geometry), bench.stitch(s.order)
        rows = [origin.document_slices[i] for i in s.order]
        slots = [*range(origin.prefix_length), *(j for r in rows for j in range(r.start, r.stop))]
        cos, sin = handle_of(s.model).rope.cos_sin(goal.positions, torch.float64)
        moved = rotate(turn_back(s.model, origin)[:, :, slots], cos, sin)
    assert_close(moved, keys_of(goal), what="moved keys", tolerance=EXACT)


@given(s=scenarios(), shift=st.integers(1, 100))
def test_law_19_a_constant_added_to_all_positions_changes_no_score(s: Scenario, shift: int) -> None:
    """Only to 1e-5: upstream rounds position times frequency to float32."""
    assume(s.options.rope != "longrope")  # its frequencies change behind position 64
    plain = positions.layout

    def shifted(*given: Any) -> positions.Layout:
        placed = plain(*given)
        return dataclasses.replace(
            placed,
            positions=placed.positions + shift,
            query_position=placed.query_position + shift,
            plain=False,
        )

    with prepared(s.model, s.request) as bench:
        expected = ifkv.score(s.model, bench.stitch(s.order), s.request.query)
        with patch.object(stitch_plan, "layout", shifted):
            got = ifkv.score(s.model, bench.stitch(s.order), s.request.query)
    assert_close(got, expected, what="scores", tolerance=1e-5)


@given(s=scenarios(), geometry=GEOMETRIES)
def test_laws_20_and_22_norms_are_kept_and_scaled_once(s: Scenario, geometry: str) -> None:
    """Each pair keeps its norm, times the attention scaling, however often it was moved."""
    with prepared(s.model, s.request) as bench:
        bench.stitch()
        cache = bench.stitch(s.order, geometry)
    rotary = s.model.model.rotary_emb
    half, scaling = rotary.inv_freq.numel(), rotary.attention_scaling
    assert (scaling != 1) == (s.options.rope in ("yarn", "longrope"))
    before, after = before_rope(bench, cache), keys_of(cache)

    def norms(keys: Tensor) -> Tensor:
        return torch.hypot(keys[..., :half], keys[..., half : 2 * half])

    # Cosines and sines are float32 numbers: their squares add up to 1 to 1e-7.
    assert_close(norms(after), scaling * norms(before), what="pair norms", tolerance=1e-6)


@given(s=scenarios(), geometry=GEOMETRIES)
def test_law_20_values_are_bit_identical(s: Scenario, geometry: str) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order, geometry)
    expected = torch.cat([part.values for part in parts_of(bench, cache)], dim=2)
    assert_bit_equal(values_of(cache), expected, what="values")


@given(s=scenarios(), geometry=GEOMETRIES)
def test_law_21_dimensions_behind_the_rotary_ones_are_bit_identical(
    s: Scenario, geometry: str
) -> None:
    with prepared(s.model, s.request) as bench:
        cache = bench.stitch(s.order, geometry)
    rest = slice(2 * s.model.model.rotary_emb.inv_freq.numel(), None)
    got, want = keys_of(cache)[..., rest], before_rope(bench, cache)[..., rest]
    assert (got.shape[-1] > 0) == (s.options.family == "phi3")
    assert_bit_equal(got, want, what="unrotated dimensions")


@pytest.mark.parametrize("family", FAMILIES)
def test_law_18_other_positions_would_be_seen(family: str) -> None:
    """Keys at other positions are far from equal, so that equal ones say something."""
    model = tiny_model(family)
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, [[1, 2, 3], [4, 5, 6]])
        forward, backward = (
            ifkv.stitch(model, documents),
            ifkv.stitch(model, documents, order=[1, 0]),
        )
    difference = keys_of(forward)[:, :, 3:] - keys_of(backward)[:, :, :3]
    assert difference.abs().max() > 0.1
