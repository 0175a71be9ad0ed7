"""All that transformers' caches offer works on a stitched cache, or is refused in words."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Cache

import ifkv
from ifkv.errors import InvalidInputError
from ifkv.testing import assert_bit_equal, assert_close, tiny_model

PROMPTS = [[26, 43, 38], [7, 8, 9]]
ROWS = torch.zeros(1, 2, 1, 8)
# What each method or property gives on a cache of three layers and ten slots. `None` stands for a
# method that is tried below, or changes nothing.
WORKS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "batch_repeat_interleave": ((1,), None),
    "batch_select_indices": ((torch.tensor([0]),), None),
    "batch_size": ((), 1),
    "crop": ((), None),
    "early_initialization": ((1, 2, 8, torch.float32, torch.device("cpu")), None),
    "get_mask_sizes": ((3, 0), (13, 0)),
    "get_max_cache_shape": ((), -1),
    "get_max_length": ((), -1),
    "get_query_offset": ((), 10),
    "get_seq_length": ((), 10),
    "is_compileable": ((), False),
    "is_croppable": ((), True),
    "is_dummy": ((), [False] * 3),
    "is_initialized": ((), True),
    "is_linear": ((), [False] * 3),
    "is_recording_past": ((0,), False),
    "is_sliding": ((), [False] * 3),
    "max_batch_size": ((), 1),
    "max_cache_len": ((), -1),
    "reorder_cache": ((torch.tensor([0]),), None),
}
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "activate_past_recording": ((), "assisted decoding.* call ifkv.generate"),
    "get_conv_state": ((0,), "linear attention"),
    "get_recurrent_state": ((0,), "linear attention"),
    "has_previous_state": ((), "linear attention"),
    "offload": ((0,), "stay on the model's device"),
    "prefetch": ((0,), "stay on the model's device"),
    "reset": ((), r"Call crop\(\)"),
    "update_conv_state": ((ROWS, 0), "linear attention"),
    "update_indexer": ((ROWS, 0), "linear attention"),
    "update_recurrent_state": ((ROWS, 0), "linear attention"),
}
INTERFACE = [name for name in dir(Cache) if not name.startswith("_")]


@pytest.fixture(scope="module")
def model() -> Any:
    built = tiny_model("llama", dtype=torch.float32)
    ifkv.patch(built)
    yield built
    ifkv.unpatch(built)


@pytest.fixture(params=[None, torch.float8_e4m3fn], ids=["exact", "float8"])
def cache(request: pytest.FixtureRequest, model: Any) -> ifkv.StitchedCache:
    documents = ifkv.prefill_documents(model, [[3, 14, 15, 92, 6], [53, 58, 9]], prefix=[1, 2])
    return ifkv.stitch(model, documents, kv_dtype=request.param)


def rows(cache: ifkv.StitchedCache) -> list[torch.Tensor]:
    return [part.clone() for layer in cache.layers for part in layer.rows(slice(0, 10))]


@pytest.mark.parametrize("name", [name for name in INTERFACE if name != "update"])
def test_a_name_of_the_interface_works_or_is_refused(cache: Any, name: str) -> None:
    assert name in WORKS or name in REFUSED, f"Cache.{name} is new: read what it does"
    before = rows(cache)
    if name in REFUSED:
        given, message = REFUSED[name]
        with pytest.raises(InvalidInputError, match=rf"{name}\(\) is not for.*{message}"):
            getattr(cache, name)(*given)
    else:
        given, expected = WORKS[name]
        found = getattr(cache, name)
        assert (found(*given) if callable(found) else found) == expected
    assert (cache.get_seq_length(), len(cache), cache.batch_size) == (10, 3, 1)
    for part, was in zip(rows(cache), before, strict=True):
        assert_bit_equal(part, was, what=f"rows after {name}")


def test_a_cache_repeated_holds_several_sequences(cache: Any, model: Any) -> None:
    alone = [model(torch.tensor([ids]), past_key_values=cache.clone()).logits for ids in PROMPTS]
    many = cache.clone()
    many.batch_repeat_interleave(2)
    assert (many.batch_size, cache.batch_size) == (2, 1)
    together = model(torch.tensor(PROMPTS), past_key_values=many).logits
    assert_close(together, torch.cat(alone), what="logits of both", tolerance=1e-5)
    many.reorder_cache(torch.tensor([1, 0]))
    swapped = model(torch.tensor([[4], [5]]), past_key_values=many.clone()).logits
    many.batch_select_indices(torch.tensor([1]))
    one = model(torch.tensor([[5]]), past_key_values=many.clone()).logits
    assert_close(swapped[1:], one, what="logits of the one kept", tolerance=1e-5)
    many.crop()
    again = model(torch.tensor([PROMPTS[0]]), past_key_values=many).logits
    assert_close(again, alone[0], what="logits after crop", tolerance=1e-5)


def test_generate_of_transformers_takes_a_repeated_cache(cache: Any, model: Any) -> None:
    expected = []
    for ids in PROMPTS:
        out = ifkv.generate(model, cache, ids, max_new_tokens=4, do_sample=False)
        expected.append(out[0].tolist())
    cache.batch_repeat_interleave(2)
    full = torch.tensor([[*cache.token_ids.tolist(), *ids] for ids in PROMPTS])
    got = model.generate(full, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert got[:, cache.context_length :].tolist() == expected


def test_ifkv_s_own_functions_refuse_several_sequences(cache: Any, model: Any) -> None:
    cache.batch_repeat_interleave(2)
    before = copy.deepcopy(cache)
    calls: list[Callable[[], Any]] = [
        lambda: ifkv.score(model, cache, PROMPTS[0]),
        lambda: ifkv.recompute(model, cache, [8]),
        lambda: ifkv.generate(model, cache, PROMPTS[0]),
        lambda: ifkv.generate_many(model, [cache], PROMPTS[:1]),
        lambda: cache.keep([]),
    ]
    for call in calls:
        with pytest.raises(InvalidInputError, match=r"holds 2 sequences.*Stitch a cache for each"):
            call()
    for part, was in zip(rows(cache), rows(before), strict=True):
        assert_bit_equal(part, was, what="rows after refusals")


BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "repeated no times": (lambda c: c.batch_repeat_interleave(0), "repeats"),
    "repeated a half": (lambda c: c.batch_repeat_interleave(1.5), "repeats"),
    "a sequence that is not there": (lambda c: c.batch_select_indices(torch.tensor([1])), "below"),
    "none selected": (lambda c: c.batch_select_indices(torch.tensor([], dtype=torch.long)), "one"),
    "an order of others": (lambda c: c.reorder_cache(torch.tensor([0, 2])), "below 1"),
    "an order of halves": (lambda c: c.reorder_cache(torch.tensor([0.5])), "whole number"),
    "a layer too many": (lambda c: c.update(ROWS, ROWS, 3), "layer 3.*3 layers"),
    "a layer below": (lambda c: c.update(ROWS, ROWS, -1), "layer -1"),
    "two sequences": (
        lambda c: c.update(ROWS.repeat(2, 1, 1, 1), ROWS.repeat(2, 1, 1, 1), 0),
        r"rows of shape \(2, 2, 1, 8\).*batch_repeat_interleave",
    ),
    "other heads": (lambda c: c.update(ROWS[:, :1], ROWS[:, :1], 0), "1 sequences of 2 heads"),
    "cropped by a word": (lambda c: c.crop("all"), r"crop\(all\)"),
    "cropped to a length": (lambda c: c.crop(5), r"crop\(5\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_calls_are_refused_and_change_nothing(cache: Any, what: str) -> None:
    before = rows(cache)
    call, message = BAD[what]
    with pytest.raises(InvalidInputError, match=message):
        call(cache)
    assert (cache.get_seq_length(), cache.batch_size) == (10, 1)
    for part, was in zip(rows(cache), before, strict=True):
        assert_bit_equal(part, was, what="rows")


def test_one_sequence_is_not_spread_over_a_repeated_cache(cache: Any, model: Any) -> None:
    cache.batch_repeat_interleave(2)
    with pytest.raises(InvalidInputError, match="2 sequences"):
        model(torch.tensor(PROMPTS[:1]), past_key_values=cache)
