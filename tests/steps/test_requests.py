"""Batches in places that the properties do not draw, and those that are refused."""

from typing import Any

import pytest

import ifkv
from flashinfer_standin import FlashInferStandIn
from ifkv.backends.flashinfer import FlashInferBackend
from ifkv.errors import FingerprintMismatchError, GeometryError, InvalidInputError, NotPatchedError
from ifkv.testing import assert_bit_equal, shared_tiny_model, tiny_model
from scenario import keys_of

POOL = [[3 + (7 * i) % 90 for i in range(40)], [5, 6, 7], [9] * 30, [60, 61, 62, 63]]


@pytest.fixture
def model():
    found = shared_tiny_model("llama")
    with ifkv.patch(found):
        yield found


@pytest.fixture
def docs(model):
    return ifkv.prefill_documents(model, POOL, prefix=[1, 2])


def test_caches_made_together_lie_in_one_allocation_and_are_read_in_one_call():
    model = shared_tiny_model("llama")
    module = FlashInferStandIn(relaxed=True)
    with ifkv.patch(model, backend=FlashInferBackend(module, workspace_bytes=2**20)):
        docs = ifkv.prefill_documents(model, POOL, prefix=[1, 2])
        requests = [[docs[0], docs[1]], [docs[2]], [docs[3], docs[0]]]
        slots, prompts = [[3, 9, 30], [4, 20], [5, 7]], [[11, 12], [13], [14, 15, 16]]
        made = []
        for caches in (
            ifkv.stitch_many(model, requests),
            [ifkv.stitch(model, own) for own in requests],
        ):
            before = module.plans
            ifkv.recompute_many(model, caches, slots, prompts=prompts)
            made.append(module.plans - before)
        together, apart = made
        assert together <= 4, "causal, masked and full rows, and the answering rows"
        assert apart > 2 * together


def test_a_cache_that_has_outgrown_the_allocation_still_answers(model, docs):
    module = FlashInferStandIn(relaxed=True)
    backend = FlashInferBackend(module, workspace_bytes=2**20)
    with ifkv.patch(model, backend=backend):
        caches = ifkv.stitch_many(model, [[docs[0]], [docs[1], docs[2]]])
        for layer in caches[0].layers:
            layer.reserve(2000)
        got = ifkv.generate_many(model, caches, [[7, 8], [9]], max_new_tokens=4)
        for own, prompt, answer in zip(
            [[docs[0]], [docs[1], docs[2]]], [[7, 8], [9]], got, strict=True
        ):
            alone = ifkv.stitch(model, own)
            want = ifkv.generate(model, alone, prompt, max_new_tokens=4, do_sample=False)
            assert answer.tolist() == want[0, len(prompt) :].tolist()


def test_a_copy_of_one_cache_takes_nothing_of_the_others_along(model, docs):
    import copy

    caches = ifkv.stitch_many(model, [[docs[1]], [docs[0], docs[2]]])
    twin = copy.deepcopy(caches[0])
    assert_bit_equal(keys_of(twin), keys_of(caches[0]), what="keys of the copy")
    storage = twin.layers[0].key_buffer.untyped_storage().nbytes()
    assert storage == twin.layers[0].key_buffer.nbytes


def test_the_repetition_penalty_of_the_generation_config_counts():
    model = tiny_model("llama", seed=3)
    model.generation_config.repetition_penalty = 1.8
    with ifkv.patch(model):
        docs = ifkv.prefill_documents(model, POOL[1:3], prefix=[1])
        caches = ifkv.stitch_many(model, [[docs[0]], [docs[1], docs[0]]])
        got = ifkv.generate_many(model, caches, [[7], [8, 9]], max_new_tokens=8)
        free = ifkv.generate_many(
            model, caches, [[7], [8, 9]], max_new_tokens=8, repetition_penalty=1.0
        )
        assert [a.tolist() for a in got] != [a.tolist() for a in free]
        for cache, prompt, answer in zip(caches, [[7], [8, 9]], got, strict=True):
            want = ifkv.generate(model, cache, prompt, max_new_tokens=8, do_sample=False)
            assert answer.tolist() == want[0, len(prompt) :].tolist()


def test_a_config_that_asks_for_more_is_refused():
    model = tiny_model("llama")
    model.generation_config.no_repeat_ngram_size = 2
    with ifkv.patch(model):
        caches = ifkv.stitch_many(model, [ifkv.prefill_documents(model, POOL[1:2])])
        with pytest.raises(InvalidInputError, match="no_repeat_ngram_size=2"):
            ifkv.generate_many(model, caches, [[7]])


def test_no_requests_give_no_results(model):
    assert ifkv.stitch_many(model, []) == []
    assert ifkv.score_many(model, [], []) == []
    assert ifkv.recompute_many(model, [], []) == []
    assert ifkv.generate_many(model, [], []) == []


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a slot out of range": (
        lambda m, c: ifkv.recompute_many(m, c, [[3], [500]], prompts=[[7], [8]]),
        InvalidInputError,
        r"request 1: slot 500 is out of range",
    ),
    "an empty prompt": (
        lambda m, c: ifkv.recompute_many(m, c, [[3], [4]], prompts=[[7], []]),
        InvalidInputError,
        "request 1: the prompt is empty",
    ),
    "an id outside the vocabulary": (
        lambda m, c: ifkv.generate_many(m, c, [[7], [9999]]),
        InvalidInputError,
        "request 1: the prompt holds token id 9999",
    ),
    "a query that is text": (
        lambda m, c: ifkv.score_many(m, c, [[7], "why"]),
        InvalidInputError,
        "request 1: the query is a string",
    ),
    "too few queries": (
        lambda m, c: ifkv.score_many(m, c, [[7]]),
        InvalidInputError,
        "queries has 1 entries for 2 requests",
    ),
    "prompts that are one number": (
        lambda m, c: ifkv.generate_many(m, c, 7),
        InvalidInputError,
        "prompts is of type int",
    ),
    "the same cache twice": (
        lambda m, c: ifkv.recompute_many(m, [c[0], c[0]], [[3], [4]]),
        InvalidInputError,
        "requests 0 and 1 have the same cache",
    ),
    "a cache twice, to be answered from": (
        lambda m, c: ifkv.generate_many(m, [c[1], c[1]], [[3], [4]]),
        InvalidInputError,
        "requests 0 and 1 have the same cache",
    ),
    "no length": (
        lambda m, c: ifkv.generate_many(m, c, [[3], [4]], max_new_tokens=0),
        InvalidInputError,
        "max_new_tokens is 0",
    ),
    "no rows in a block": (
        lambda m, c: ifkv.recompute_many(m, c, [[3], [4]], block_tokens=0),
        InvalidInputError,
        "block_tokens is 0",
    ),
    "what is no cache": (
        lambda m, c: ifkv.score_many(m, [c[0], None], [[3], [4]]),
        InvalidInputError,
        "request 1: a NoneType",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_one_bad_request_is_refused_before_any_cache_changes(model, docs, case):
    call, kind, message = BAD[case]
    caches = ifkv.stitch_many(model, [[docs[0], docs[1]], [docs[2]]])
    before = [keys_of(cache).clone() for cache in caches]
    with pytest.raises(kind, match=message):
        call(model, caches)
    for cache, keys in zip(caches, before, strict=True):
        assert_bit_equal(keys_of(cache), keys, what="keys after the refusal")


def test_stitching_many_names_the_request_it_refuses(model, docs):
    with pytest.raises(InvalidInputError, match="request 1: no documents"):
        ifkv.stitch_many(model, [[docs[0]], []])
    with pytest.raises(InvalidInputError, match="1 orders were given for 2"):
        ifkv.stitch_many(model, [[docs[0]], [docs[1]]], orders=[None])
    with pytest.raises(InvalidInputError, match=r"request 1: order is \[0\]"):
        ifkv.stitch_many(model, [docs[:1], docs[:2]], orders=[None, [0]])
    other = tiny_model("llama", seed=9)
    with ifkv.patch(other):
        strange = ifkv.prefill_documents(other, POOL[:1], prefix=[1, 2])
    with pytest.raises(FingerprintMismatchError, match="request 1: document 0 was made by"):
        ifkv.stitch_many(model, [[docs[0]], strange])


def test_overlapping_geometries_can_be_scored_only(model, docs):
    caches = ifkv.stitch_many(model, [[docs[0]], [docs[1]]], geometry="hl-tp")
    with pytest.raises(GeometryError, match="request 0: recompute needs the geometry 'global'"):
        ifkv.recompute_many(model, caches, [[3], [3]])
    with pytest.raises(GeometryError, match="request 0: generate_many needs"):
        ifkv.generate_many(model, caches, [[3], [3]])


def test_a_model_that_is_not_patched_is_refused(docs):
    other = tiny_model("llama", seed=8)
    with pytest.raises(NotPatchedError):
        ifkv.stitch_many(other, [docs])


def test_a_step_that_fails_leaves_the_caches_whole(model, docs):
    caches = ifkv.stitch_many(model, [[docs[0]], [docs[1], docs[2]]])
    want = ifkv.generate_many(model, caches, [[7], [8]], max_new_tokens=4)

    def fail(index: int, token: int) -> None:
        raise RuntimeError("the listener is gone")

    with pytest.raises(RuntimeError, match="gone"):
        ifkv.generate_many(model, caches, [[7], [8]], max_new_tokens=4, emit=fail)
    assert [cache.get_seq_length() for cache in caches] == [c.context_length for c in caches]
    again = ifkv.generate_many(model, caches, [[7], [8]], max_new_tokens=4)
    assert [a.tolist() for a in again] == [w.tolist() for w in want]


def test_an_answer_that_could_cross_longropes_boundary_is_refused():
    model = tiny_model("phi3", rope="longrope", head_dim=None)
    with ifkv.patch(model) as handle:
        room = handle.rope.limit
        docs = ifkv.prefill_documents(model, [[5] * (room - 10)])
        caches = ifkv.stitch_many(model, [docs])
        assert len(ifkv.generate_many(model, caches, [[7]], max_new_tokens=10)[0]) <= 10
        with pytest.raises(InvalidInputError, match=r"request 0: .* longrope changes"):
            ifkv.generate_many(model, caches, [[7]], max_new_tokens=11)
