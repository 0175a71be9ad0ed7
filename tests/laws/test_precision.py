"""The laws in the dtypes models run in: float32 to 1e-5, half precision against its own floor."""

import dataclasses

import pytest
import torch
from hypothesis import given
from torch import Tensor
from transformers import PreTrainedModel

import ifkv
from ifkv.testing import (
    assert_bit_equal,
    assert_close,
    assert_within_floor,
    dense_prefill,
    dense_recompute,
    dense_scores,
    dense_stitched,
    rope_types,
    shared_tiny_model,
    truth_model,
)
from ifkv.testing.strategies import Request
from scenario import Scenario, assert_rows_equal, cache_of, keys_of, prepared, scenarios, values_of
from tried import SLIDING_FAMILIES, SMOOTH_FAMILIES

HALVES = [torch.bfloat16, torch.float16]
SUPPORTED = ("default", "linear", "llama3", "yarn")
FAMILY_ROPES = [(f, r) for f in SMOOTH_FAMILIES for r in rope_types(f) if r in SUPPORTED]
FLOAT32 = 1e-5


def some_request(seed: int = 0) -> Request:
    """A few dozen tokens, so that largest errors are taken over thousands of numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(97, (count,), generator=generator).tolist()

    return Request(draw(3), [draw(n) for n in (14, 9, 20, 6)], draw(5), draw(4))


def scattered(total: int) -> list[int]:
    return sorted({*range(20, total, 3), *range(30, 38)})


@given(s=scenarios())
def test_laws_1_and_10_in_float32(s: Scenario) -> None:
    model = shared_tiny_model(**dataclasses.asdict(s.options), dtype=torch.float32)
    with prepared(model, s.request) as bench:
        cache = bench.stitch(s.order)
        logits = ifkv.recompute(model, cache, range(s.total), prompt_ids=s.request.prompt)
    full = dense_prefill(model, [*cache.token_ids.tolist(), *s.request.prompt])
    size = max(1.0, full.keys.abs().max().item())  # relative to the largest number there is
    assert_rows_equal(cache, full, what="at ratio 1", tolerance=FLOAT32 * size)
    size = max(1.0, full.logits.abs().max().item())
    assert_close(logits, full.logits[-1], what="logits", tolerance=FLOAT32 * size)


@given(s=scenarios())
def test_any_selection_in_float32(s: Scenario) -> None:
    model = shared_tiny_model(**dataclasses.asdict(s.options), dtype=torch.float32)
    with prepared(model, s.request) as bench:
        cache = bench.stitch(s.order)
        scores = ifkv.score(model, cache, s.request.query)
        logits = ifkv.recompute(model, cache, s.slots, prompt_ids=s.request.prompt)
    context = dense_stitched(model, s.request.prefix, s.request.documents, s.order)
    truth = dense_recompute(model, context, s.slots, s.request.prompt)
    size = max(1.0, truth.keys.abs().max().item())
    assert_rows_equal(cache, truth, what="after recompute", tolerance=FLOAT32 * size)
    size = max(1.0, truth.logits.abs().max().item())
    assert_close(logits, truth.logits[-1], what="logits", tolerance=FLOAT32 * size)
    expected = dense_scores(model, context, s.request.query, layers=[1, 2])
    assert_close(scores, expected, what="scores", tolerance=FLOAT32)


@given(s=scenarios())
def test_laws_12_and_16_to_the_bit_in_bfloat16(s: Scenario) -> None:
    model = shared_tiny_model(**dataclasses.asdict(s.options), dtype=torch.bfloat16)
    with prepared(model, s.request) as bench:
        before, cache = bench.stitch(s.order), bench.recomputed(s.slots, s.order)
    kept = sorted(set(range(s.total)) - set(s.slots))
    for pick in (keys_of, values_of):
        assert_bit_equal(pick(cache)[:, :, kept], pick(before)[:, :, kept], what="unselected rows")


def upstream(model: PreTrainedModel, ids: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and the last logits of the model's own forward."""
    from transformers import DynamicCache

    with torch.no_grad():
        # A cache made without the config keeps all keys of a sliding layer.
        out = model(torch.tensor([ids]), past_key_values=DynamicCache())
    layers = cache_of(out).layers
    keys, values = (torch.cat([getattr(layer, x) for layer in layers]) for x in ("keys", "values"))
    return keys, values, out.logits[0, -1]


def assert_floor(actual: tuple[Tensor, ...], model: PreTrainedModel, ids: list[int]) -> None:
    plain, truth = upstream(model, ids), upstream(truth_model(model), ids)
    names = ("keys", "values", "logits")
    for name, got, floor, want in zip(names, actual, plain, truth, strict=True):
        # Over a single row of logits the largest error is one number's luck.
        measure = "rms" if name == "logits" else "max"
        assert_within_floor(got, floor, want, what=name, measure=measure)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("family", "rope"), FAMILY_ROPES)
def test_law_1_within_the_floor(family: str, rope: str, dtype: torch.dtype) -> None:
    model = shared_tiny_model(family, rope=rope, dtype=dtype)
    request = some_request()
    with prepared(model, request) as bench:
        cache = bench.stitch([2, 0, 3, 1])
        logits = ifkv.recompute(
            model, cache, range(cache.context_length), prompt_ids=request.prompt
        )
    assert logits is not None
    ids = [*cache.token_ids.tolist(), *request.prompt]
    assert_floor((keys_of(cache), values_of(cache), logits), model, ids)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family", [f for f in SLIDING_FAMILIES if f in SMOOTH_FAMILIES])
def test_law_1_within_the_floor_under_a_window(family: str, dtype: torch.dtype) -> None:
    model = shared_tiny_model(family, sliding_window=11, dtype=dtype)
    request = some_request(1)
    with prepared(model, request) as bench:
        cache = bench.stitch()
        logits = ifkv.recompute(
            model, cache, range(cache.context_length), prompt_ids=request.prompt
        )
    assert logits is not None
    ids = [*request.context, *request.prompt]
    assert_floor((keys_of(cache), values_of(cache), logits), model, ids)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family", SMOOTH_FAMILIES)
def test_law_3_within_the_floor(family: str, dtype: torch.dtype) -> None:
    """One document, nothing recomputed: only the rotation and the merge of parts are ours."""
    model = shared_tiny_model(family, dtype=dtype)
    request = dataclasses.replace(some_request(2), documents=[some_request(3).documents[2]])
    with prepared(model, request) as bench:
        cache = bench.stitch()
        logits = ifkv.recompute(model, cache, [], prompt_ids=request.prompt)
    assert logits is not None
    ids = [*request.context, *request.prompt]
    assert_floor((keys_of(cache), values_of(cache), logits), model, ids)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family", SMOOTH_FAMILIES)
def test_any_selection_within_the_floor(family: str, dtype: torch.dtype) -> None:
    """Against the dense oracle's own error in the same dtype."""
    model = shared_tiny_model(family, rope="default", dtype=dtype)
    request = some_request(4)
    slots = scattered(len(request.context))
    with prepared(model, request) as bench:
        cache = bench.stitch()
        scores = ifkv.score(model, cache, request.query)
        logits = ifkv.recompute(model, cache, slots, prompt_ids=request.prompt)
    results = []
    for reference in (model, truth_model(model)):
        context = dense_stitched(reference, request.prefix, request.documents)
        trace = dense_recompute(reference, context, slots, request.prompt)
        asked = dense_scores(reference, context, request.query, layers=[1, 2])
        results.append((trace.keys, trace.values, trace.logits[-1], asked.float()))
    actual = (keys_of(cache), values_of(cache), logits, scores)
    names = ("keys", "values", "logits", "scores")
    for name, got, plain, truth in zip(names, actual, *results, strict=True):
        measure = "max" if name in ("keys", "values") else "rms"
        assert_within_floor(got, plain, truth, what=name, measure=measure)
