"""Guard of speed that noise cannot break: operations, rows and bytes are counted, not seconds.

Every limit follows from a formula of `ifkv.cost` or from a shape. The last tests put slow paths in
place of fast ones and see the laws fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import ifkv
from counting import Allocations, allocations, live_bytes, operations, rows_counted
from ifkv.backends import reference, tiles
from ifkv.cache import stitch as stitching
from ifkv.cache.layer import capacity_for
from ifkv.cache.stitched import StitchedCache
from ifkv.cost import ModelShape, prefill_cost, recompute_cost, scoring_cost
from ifkv.documents import DocumentCache
from ifkv.forward import graphs as cuda_graphs
from ifkv.steps import recompute as recomputation
from ifkv.steps import recompute_request, rows_pass
from ifkv.steps.scoring_layers import default_layers
from ifkv.testing import tiny_model

PROMPT = [7] * 24
PREFIX = [1, 2, 3]
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 4},
    "middling": {
        "num_layers": 8,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_heads": 6,
        "num_kv_heads": 2,
    },
}


@pytest.fixture(scope="module", params=SIZES)
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    options = SIZES[request.param] | {"max_position_embeddings": 8192}
    built = tiny_model("llama", dtype=torch.float32, **options)
    with ifkv.patch(built, backend="reference"):
        yield built


def documents(model: PreTrainedModel, length: int, count: int = 4) -> list[DocumentCache]:
    """Documents that make a context of ``length`` with the prefix."""
    rest = length - len(PREFIX)
    lengths = [rest // count] * (count - 1) + [rest - rest // count * (count - 1)]
    return ifkv.prefill_documents(model, [[5] * n for n in lengths], prefix=PREFIX)


def stitched(model: PreTrainedModel, length: int) -> StitchedCache:
    return ifkv.stitch(model, documents(model, length))


# --- laws ---------------------------------------------------------------------------------------

TOLERANCE = 1.02


def spread(length: int, stride: int) -> torch.Tensor:
    return torch.arange(length // 4 + 3, length, stride)


def check_recompute_operations(model: PreTrainedModel, length: int, stride: int) -> None:
    """No more than the formula, and what tiles of rows compute only to mask it."""
    shape, slots = ModelShape.of(model), spread(length, stride)
    cache = stitched(model, length)
    total = operations(lambda: ifkv.recompute(model, cache, slots, prompt_ids=PROMPT))
    needed = (recompute_cost(shape, slots, length, len(PROMPT)) + shape.head()).flops
    # A row is given the keys up to its tile's last row: half a tile's width more on average.
    wasted_pairs = (len(slots) * stride + len(PROMPT)) * tiles.TILE_ROWS / 2
    wasted = shape.attention(wasted_pairs, 0).flops * shape.num_layers
    assert total <= TOLERANCE * (needed + wasted)
    assert total >= needed / TOLERANCE, "less than the mathematics needs: something is not counted"


def check_scoring_operations(model: PreTrainedModel, length: int) -> None:
    shape, cache = ModelShape.of(model), stitched(model, length)
    total = operations(lambda: ifkv.score(model, cache, PROMPT))
    needed = scoring_cost(shape, len(PROMPT), length, default_layers(shape.num_layers)).flops
    assert needed / TOLERANCE <= total <= TOLERANCE * needed


def check_recompute_rows(model: PreTrainedModel, length: int) -> None:
    """Selected rows and the prompt pass once through every layer; one row leaves the last."""
    slots, last = spread(length, 7), ModelShape.of(model).num_layers - 1
    cache = stitched(model, length)
    with rows_counted(model) as seen:
        ifkv.recompute(model, cache, slots, prompt_ids=PROMPT)
    rows = len(slots) + len(PROMPT)
    for name, count in seen.items():
        if name == "lm_head":
            assert count == 1, "logits are of one row"
        elif name.startswith(f"layers.{last}."):
            limit = 1 if ".mlp." in name else rows + 1
            assert count <= limit, f"{name}: nobody reads the last layer of other rows"
        else:
            assert count == rows, f"{name} was given {count} rows of {rows}"


def check_scoring_rows(model: PreTrainedModel, length: int) -> None:
    deepest = default_layers(ModelShape.of(model).num_layers)[-1]
    cache = stitched(model, length)
    with rows_counted(model) as seen:
        ifkv.score(model, cache, PROMPT)
    for name, count in seen.items():
        layer = int(name.split(".")[1]) if name.startswith("layers.") else deepest + 1
        assert layer <= deepest, f"{name} ran behind the deepest scoring layer"
        assert layer < deepest or ".mlp." not in name, f"{name}: nobody reads its output"
        assert count == len(PROMPT)


def check_recompute_allocations(model: PreTrainedModel) -> None:
    """The same rows allocate the same over four times the context, but for lists of slots."""
    short, long = 1024, 4096

    def run(length: int) -> Allocations:
        # As far from the context's end in both, so that tiles are the same.
        cache, slots = stitched(model, length), torch.arange(length - 500, length, 3)
        return allocations(lambda: ifkv.recompute(model, cache, slots, prompt_ids=PROMPT))

    few, many = run(short), run(long)
    # A list of 8-byte numbers, once; no layer may have anything of the kind.
    assert many.total - few.total <= 8 * (long - short)
    assert many.calls == few.calls, "more operations over a longer context"


def check_scoring_allocations(model: PreTrainedModel) -> None:
    """One vector [T] a scoring layer and the blocks it is made in, which do not grow."""
    shape = ModelShape.of(model)
    largest = []
    for length in (2048, 4096):
        cache = stitched(model, length)
        seen = allocations(lambda cache=cache: ifkv.score(model, cache, PROMPT))
        largest.append(max(seen.sizes))
    assert largest[0] == largest[1] == 4 * shape.heads * len(PROMPT) * 1024


def check_stitch_allocations(model: PreTrainedModel, length: int) -> None:
    """The cache itself, its keys once more in passing, and tables of angles."""
    shape, parts = ModelShape.of(model), documents(model, length)
    seen = allocations(lambda: ifkv.stitch(model, parts))
    buffers = capacity_for(length) * shape.token_bytes
    angles = 16 * length * shape.head_dim * shape.element_size
    assert buffers <= seen.total <= buffers + length * shape.token_bytes / 2 + angles


def recompute_peak(shape: ModelShape, rows: int, stride: int, intermediate: int) -> float:
    """Bytes that recomputing rows a stride apart may hold above weights and cache.

    One layer's activations: three as wide as the MLP, six as the hidden states, queries with their
    attention, keys with values. And for all layers the masks of the tiles' fringes, an element for
    each query head of a group.
    """
    widths = 3 * intermediate + 6 * shape.hidden_size + 2 * shape.attention_width
    activations = rows * (widths + 2 * shape.kv_width) * shape.element_size
    span = min(tiles.TILE_SPAN, tiles.TILE_ROWS * stride)
    group = shape.attention_width // shape.kv_width
    return activations + rows * span * (group * shape.element_size + 1)


def check_recompute_peak(model: PreTrainedModel, length: int) -> None:
    shape, stride = ModelShape.of(model), 7
    slots, cache = spread(length, stride), stitched(model, length)
    peak = live_bytes(lambda: ifkv.recompute(model, cache, slots, prompt_ids=PROMPT))
    rows = len(slots) + len(PROMPT)
    assert peak <= recompute_peak(shape, rows, stride, model.config.intermediate_size)


def check_stitch_peak(model: PreTrainedModel, length: int) -> None:
    """The cache, tables of angles, and the keys of one document at a time, turned."""
    shape, count = ModelShape.of(model), 8
    parts = documents(model, length, count)
    peak = live_bytes(lambda: ifkv.stitch(model, parts))
    passing = max(len(part) for part in parts) * shape.token_bytes
    angles = 5 * length * shape.head_dim * shape.element_size
    assert peak <= capacity_for(length) * shape.token_bytes + passing + angles


@pytest.mark.parametrize(("length", "stride"), [(1024, 20), (2048, 7), (2048, 3)])
def test_recompute_runs_the_operations_of_its_formula(
    model: PreTrainedModel, length: int, stride: int
) -> None:
    check_recompute_operations(model, length, stride)


@pytest.mark.parametrize("length", [512, 2048])
def test_scoring_runs_the_operations_of_its_formula(model: PreTrainedModel, length: int) -> None:
    check_scoring_operations(model, length)


def test_recompute_runs_no_row_that_nobody_reads(model: PreTrainedModel) -> None:
    check_recompute_rows(model, 700)


def test_scoring_stops_in_its_deepest_layer(model: PreTrainedModel) -> None:
    check_scoring_rows(model, 700)


def test_no_layer_allocates_by_the_context_when_recomputing(model: PreTrainedModel) -> None:
    check_recompute_allocations(model)


def test_scoring_allocates_blocks_that_do_not_grow(model: PreTrainedModel) -> None:
    check_scoring_allocations(model)


def test_stitching_allocates_the_cache_and_little_else(model: PreTrainedModel) -> None:
    check_stitch_allocations(model, 1500)


def test_recompute_holds_one_layer_of_its_rows(model: PreTrainedModel) -> None:
    check_recompute_peak(model, 4096)


def test_stitching_turns_one_document_at_a_time(model: PreTrainedModel) -> None:
    check_stitch_peak(model, 4096)


@pytest.mark.parametrize(
    ("sizes", "tied", "intermediate"),
    [
        ((30, 576, 9, 3, 64), 49152, 1536),  # SmolLM2-135M
        ((28, 1024, 16, 8, 128), 151936, 3072),  # Qwen3-0.6B
    ],
)
@pytest.mark.parametrize("element", [2, 4])
def test_what_recompute_may_hold_is_a_tenth_of_weights_and_cache(
    sizes: tuple[int, ...], tied: int, intermediate: int, element: int
) -> None:
    layers, hidden, heads, kv_heads, head_dim = sizes
    attention = 2 * hidden * (heads + kv_heads) * head_dim
    shape = ModelShape(
        layer_parameters=attention + 3 * hidden * intermediate,
        attention_width=heads * head_dim,
        num_layers=layers,
        kv_width=kv_heads * head_dim,
        element_size=element,
        hidden_size=hidden,
        head_dim=head_dim,
        vocabulary=tied,
    )
    length = 8192
    weights = element * (layers * shape.layer_parameters + tied * hidden)
    most = recompute_peak(shape, int(0.15 * length) + len(PROMPT), 7, intermediate)
    assert most <= 0.1 * (weights + length * shape.token_bytes)


def test_stitching_multiplies_no_matrices(model: PreTrainedModel) -> None:
    parts = documents(model, 600)
    # transformers 5.4 makes the angles, one per position and frequency, by a matrix product.
    angles = 2 * 600 * model.base_model.rotary_emb.inv_freq.numel()
    assert operations(lambda: ifkv.stitch(model, parts)) <= angles


def test_a_request_costs_a_share_of_a_full_prefill(model: PreTrainedModel) -> None:
    length, stride = 2048, 7
    shape, cache = ModelShape.of(model), stitched(model, length)
    slots = spread(length, stride)

    def request() -> None:
        ifkv.score(model, cache, PROMPT)
        ifkv.recompute(model, cache, slots, prompt_ids=PROMPT)

    share = operations(request) / prefill_cost(shape, length + len(PROMPT)).flops
    bound = ifkv.speedup_bound(
        shape,
        context_length=length,
        query_length=len(PROMPT),
        ratio=len(slots) / length,
        scoring_layers=default_layers(shape.num_layers)[-1] + 1,
        position=float(slots.double().mean()) / length,
    )
    assert share * bound == pytest.approx(1, abs=0.15)


# --- slow paths that the laws must not let pass ------------------------------------------------


def test_masked_blocks_that_are_computed_are_noticed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dense(slots: list[int]) -> tuple[tiles.Tile, ...]:
        return (tiles.Tile(0, len(slots), slots[0], slots[-1]),)

    monkeypatch.setattr(reference, "cut_into_tiles", dense)
    with pytest.raises(AssertionError):
        check_recompute_operations(model, 2048, 3)


def test_rows_that_nobody_selected_are_noticed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = recompute_request._checked_slots
    monkeypatch.setattr(
        recompute_request, "_checked_slots", lambda slots, length: fast(range(length), length)
    )
    with pytest.raises(AssertionError, match="rows of"):
        check_recompute_rows(model, 700)


def test_scoring_through_all_layers_is_noticed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, depth = cuda_graphs.run_layers, ModelShape.of(model).num_layers

    def through(
        m: Any, hidden: Any, positions: Any, rotation: Any, run: Any, stop: int, **more: Any
    ) -> Any:
        fast(m, hidden, positions, rotation, run, depth, **more)
        return fast(m, hidden, positions, rotation, run, stop, **more)

    monkeypatch.setattr(cuda_graphs, "run_layers", through)
    with pytest.raises(AssertionError):
        check_scoring_rows(model, 700)
    with pytest.raises(AssertionError):
        check_scoring_operations(model, 512)


def test_a_copy_of_the_cache_in_every_layer_is_noticed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = rows_pass.RowsPass.update

    def copying(self: Any, keys: Any, values: Any, layer_idx: int, **unread: Any) -> Any:
        for cache in self._caches:
            cache.layers[layer_idx].keys.clone()
        return fast(self, keys, values, layer_idx)

    monkeypatch.setattr(rows_pass.RowsPass, "update", copying)
    with pytest.raises(AssertionError):
        check_recompute_allocations(model)


def test_logits_of_all_rows_are_noticed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = recomputation.row_logits

    def all_rows(m: Any, hidden: torch.Tensor) -> torch.Tensor:
        return fast(m, hidden.expand(-1, 5, -1))[:1]

    monkeypatch.setattr(recomputation, "row_logits", all_rows)
    with pytest.raises(AssertionError, match="one row"):
        check_recompute_rows(model, 700)


def test_attention_norms_in_one_piece_are_noticed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifkv.backends.norms.NORM_BLOCK", 1 << 20)
    with pytest.raises(AssertionError):
        check_scoring_allocations(model)


def test_what_is_kept_of_every_layer_is_noticed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, kept = rows_pass.RowsPass.update, []

    def keeping(self: Any, keys: Any, values: Any, layer_idx: int, **unread: Any) -> Any:
        kept.extend(cache.layers[layer_idx].keys.clone() for cache in self._caches)
        return fast(self, keys, values, layer_idx)

    monkeypatch.setattr(rows_pass.RowsPass, "update", keeping)
    with pytest.raises(AssertionError):
        check_recompute_peak(model, 4096)


def test_turning_all_documents_at_once_is_noticed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, kept = stitching.place, []

    def keeping(rows: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(rows.clone())
        return fast(rows, *args, **kwargs)

    monkeypatch.setattr(stitching, "place", keeping)
    with pytest.raises(AssertionError):
        check_stitch_peak(model, 4096)
