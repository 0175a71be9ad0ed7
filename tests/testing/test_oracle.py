"""The oracle against unpatched upstream models, and against itself where a law fixes the answer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ifkv.testing import (
    LAYERED_WINDOWS,
    assert_close,
    assert_within_floor,
    dense_forward,
    dense_prefill,
    dense_recompute,
    dense_rows,
    dense_scores,
    dense_stitched,
    rope_types,
    shared_tiny_model,
    tiny_model,
    truth_model,
)
from ifkv.testing.strategies import Request, requests, slot_subsets
from scenario import cache_of
from tried import FAMILIES, SLIDING_FAMILIES, SMOOTH_FAMILIES, head_width

EXACT = 1e-12  # float64 with wide norms; 3e-14 is what is seen
FAMILY_ROPES = [(family, rope) for family in FAMILIES for rope in rope_types(family)]


def some_ids(count: int, seed: int = 1) -> Tensor:
    return torch.randint(97, (count,), generator=torch.Generator().manual_seed(seed))


def assert_equals_upstream(model: PreTrainedModel, ids: Tensor, tolerance: float) -> None:
    """Compare logits and caches of one forward; upstream first, as it may set `inv_freq`."""
    with torch.no_grad():
        # A cache made without the config keeps all keys of a sliding layer.
        upstream = model(ids[None], past_key_values=DynamicCache())
    ours = dense_prefill(model, ids)
    keys = torch.cat([layer.keys for layer in cache_of(upstream).layers])
    values = torch.cat([layer.values for layer in cache_of(upstream).layers])
    assert_close(ours.keys[0], keys[0], what="layer-0 keys", tolerance=min(tolerance, 1e-12))
    assert_close(ours.keys, keys, what="keys", tolerance=tolerance)
    assert_close(ours.values, values, what="values", tolerance=tolerance)
    assert_close(ours.logits, upstream.logits[0], what="logits", tolerance=tolerance)


@pytest.mark.parametrize(("family", "rope"), FAMILY_ROPES)
@pytest.mark.parametrize("length", [40, 90])  # on either side of where longrope and dynamic change
def test_prefill_equals_sdpa(family: str, rope: str, length: int) -> None:
    assert_equals_upstream(tiny_model(family, rope=rope), some_ids(length), EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_equals_eager(family: str) -> None:
    """Upstream's eager softmax is float32 even in float64, so no closer than that."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    assert_equals_upstream(model, some_ids(40), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_mirrors_the_float32_norms_of_upstream(family: str) -> None:
    assert_equals_upstream(tiny_model(family, wide_norms=False), some_ids(40), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("head_dim", "num_kv_heads"), [(24, 2), (12, 1), (6, 4)])
def test_prefill_with_head_geometries(family: str, head_dim: int, num_kv_heads: int) -> None:
    head_dim = head_width(family, head_dim) or 8
    model = tiny_model(family, head_dim=head_dim, num_kv_heads=num_kv_heads)
    assert dense_prefill(model, [1, 2, 3]).keys.shape == (3, num_kv_heads, 3, head_dim)
    assert_equals_upstream(model, some_ids(20), EXACT)


@pytest.mark.parametrize("family", SLIDING_FAMILIES)
@pytest.mark.parametrize("window", [1, 7])
def test_prefill_with_a_sliding_window(family: str, window: int) -> None:
    model = tiny_model(family, sliding_window=window)
    ids = some_ids(30)
    assert_equals_upstream(model, ids, EXACT)
    seen = [int((weights[0, -1] > 0).sum()) for weights in dense_prefill(model, ids).attention]
    assert seen == ([30, window, window] if family in LAYERED_WINDOWS else [window] * 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_mask_and_positions_equal_upstream(family: str) -> None:
    """A random mask over scattered positions, which upstream takes as a 4D mask."""
    model = tiny_model(family)
    ids, count = some_ids(25), 25
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(count, count, generator=generator) < 0.4
    mask |= torch.eye(count, dtype=torch.bool)
    positions = torch.randperm(400, generator=generator)[:count]
    with torch.no_grad():
        upstream = model(
            ids[None], attention_mask=mask[None, None], position_ids=positions[None], use_cache=True
        )
    ours = dense_forward(model, ids, positions, mask)
    assert_close(ours.logits, upstream.logits[0], what="logits", tolerance=EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", SMOOTH_FAMILIES)
def test_half_precision_stays_within_the_floor(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    ids = some_ids(40)
    with torch.no_grad():
        plain = model(ids[None]).logits[0]
        truth = truth_model(model)(ids[None]).logits[0]
    ours = dense_prefill(model, ids).logits
    assert_within_floor(ours, plain, truth, what="logits", measure="rms")


def test_float32_equals_upstream(tiny) -> None:
    model = tiny("llama", dtype=torch.float32)
    ids = some_ids(60)
    with torch.no_grad():
        upstream = model(ids[None]).logits[0]
    assert_close(dense_prefill(model, ids).logits, upstream, what="logits", tolerance=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@given(request=requests())
def test_stitched_documents_are_blind_to_each_other(family: str, request: Request) -> None:
    """Each document's rows equal those of one joint pass under a block-diagonal mask."""
    model = shared_tiny_model(family)
    stitched = dense_stitched(model, request.prefix, request.documents)
    assert stitched.token_ids.tolist() == request.context
    total, prefix = len(request.context), len(request.prefix)
    mask = torch.zeros(total, total, dtype=torch.bool)
    mask[:, :prefix] = True
    positions = torch.arange(total)
    for rows in stitched.document_slices:
        mask[rows, rows] = True
        positions[rows] = torch.arange(prefix, prefix + rows.stop - rows.start)
    mask &= torch.ones(total, total).tril().bool()
    joint = dense_forward(model, request.context, positions, mask)
    expected = joint.keys_before_rope
    assert_close(stitched.keys_before_rope, expected, what="keys before RoPE", tolerance=EXACT)
    assert_close(stitched.values, joint.values, what="values", tolerance=EXACT)


@pytest.mark.parametrize("family", FAMILIES)
@given(request=requests(), data=st.data())
def test_recompute_of_enough_rows_equals_full_prefill(
    family: str, request: Request, data: st.DataObject
) -> None:
    """The first document is exact already, so covering all the others repairs everything."""
    model = shared_tiny_model(family)
    order = data.draw(st.permutations(range(len(request.documents))))
    stitched = dense_stitched(model, request.prefix, request.documents, order)
    first = stitched.document_slices[0].stop
    total = len(stitched.token_ids)
    extra = data.draw(slot_subsets(first))
    slots = data.draw(st.permutations([*extra, *range(first, total)]))
    repaired = dense_recompute(model, stitched, slots, request.prompt)
    full = dense_prefill(model, [*stitched.token_ids.tolist(), *request.prompt])
    assert_close(repaired.keys, full.keys, what="keys", tolerance=EXACT)
    assert_close(repaired.values, full.values, what="values", tolerance=EXACT)
    answer = slice(-len(request.prompt), None)
    assert_close(repaired.logits[answer], full.logits[answer], what="logits", tolerance=EXACT)


@given(request=requests(min_documents=2), data=st.data())
def test_recompute_is_layer_by_layer(request: Request, data: st.DataObject) -> None:
    """Layer-1 rows of any selection are exact; rows not selected keep their values bit for bit."""
    model = shared_tiny_model("qwen3")
    stitched = dense_stitched(model, request.prefix, request.documents)
    slots = data.draw(slot_subsets(len(request.context)))
    repaired = dense_recompute(model, stitched, slots)
    full = dense_prefill(model, request.context)
    for layer in (0, 1):
        got, want = repaired.values[layer][:, slots], full.values[layer][:, slots]
        assert_close(got, want, what=f"layer {layer} values", tolerance=EXACT)
    kept = sorted(set(range(len(request.context))) - set(slots))
    assert torch.equal(repaired.values[:, :, kept], stitched.values[:, :, kept])


def test_stitching_alone_is_wrong() -> None:
    """The oracle can tell: without recompute the error is as large as the values themselves."""
    model = shared_tiny_model("llama")
    ids = [some_ids(8, seed).tolist() for seed in range(3)]
    stitched = dense_stitched(model, [1], ids)
    full = dense_prefill(model, stitched.token_ids)
    prompt = dense_recompute(model, stitched, [], [5, 6])
    exact = dense_prefill(model, [*stitched.token_ids.tolist(), 5, 6])
    assert (stitched.values - full.values).abs().max() > 0.5
    assert (prompt.logits[-1] - exact.logits[-1]).abs().max() > 0.5


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_scores_equal_upstream_attention(family: str) -> None:
    """Over a single document upstream's attention weights are the answer (float32 softmax)."""
    model = tiny_model(family)
    document, query = some_ids(15).tolist(), some_ids(4, 2).tolist()
    stitched = dense_stitched(model, [3, 4], [document])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        upstream = model(torch.tensor([[3, 4, *document, *query]]), output_attentions=True)
    mean = [upstream.attentions[layer][0].mean(0)[-4:, :17] for layer in (1, 2)]
    for reduction, expected in (
        ("l2", (mean[0].norm(dim=0) + mean[1].norm(dim=0)) / 2),
        ("sum", (mean[0].sum(0) + mean[1].sum(0)) / 2),
    ):
        ours = dense_scores(model, stitched, query, layers=[1, -1], reduction=reduction)
        assert_close(ours, expected, what=f"{reduction} scores", tolerance=1e-6)


@given(request=requests())
def test_scores_under_overlapping_positions(request: Request) -> None:
    """Documents at the same positions: what a document scores does not depend on their order."""
    model = shared_tiny_model("llama")
    forward = list(range(len(request.documents)))
    prefix, longest = len(request.prefix), max(map(len, request.documents))
    asked_at = range(prefix + longest, prefix + longest + len(request.query))
    per_order = []
    for order in (forward, forward[::-1]):
        stitched = dense_stitched(model, request.prefix, request.documents, order)
        keys_at = [*range(prefix)]
        for index in order:
            keys_at += range(prefix, prefix + len(request.documents[index]))
        scores = dense_scores(
            model,
            stitched,
            request.query,
            layers=[0, 1, 2],
            key_positions=keys_at,
            query_positions=asked_at,
        )
        per_order.append([scores[rows] for rows in stitched.document_slices])
    for index, (got, want) in enumerate(zip(per_order[1][::-1], per_order[0], strict=True)):
        assert_close(got, want, what=f"scores of document {index}", tolerance=EXACT)


def test_rows_read_only_what_the_mask_shows() -> None:
    model = shared_tiny_model("mistral")
    before = dense_prefill(model, some_ids(10))
    keys, values = before.keys_before_rope.clone(), before.values.clone()
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[:, 4:7] = False
    clean = dense_rows(model, [1, 2], [8, 9], range(10), mask, keys, values)
    keys[:, :, 4:7], values[:, :, 4:7] = 1e9, 1e9
    poisoned = dense_rows(model, [1, 2], [8, 9], range(10), mask, keys, values)
    assert torch.equal(clean.logits, poisoned.logits)
