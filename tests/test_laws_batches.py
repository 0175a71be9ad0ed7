"""Law 28: a batch of B requests is B requests, whatever their lengths and shared documents."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from transformers import PreTrainedModel

import ifkv
from flashinfer_standin import FlashInferStandIn
from ifkv.backends.flashinfer import FlashInferBackend
from ifkv.errors import FingerprintMismatchError, GeometryError, InvalidInputError, NotPatchedError
from ifkv.recomputation import cut_blocks
from ifkv.testing import assert_bit_equal, assert_close, shared_tiny_model, tiny_model
from ifkv.testing.strategies import (
    ModelOptions,
    documents,
    model_options,
    prefixes,
    prompts,
    queries,
    slot_subsets,
)
from scenario import EXACT, assert_rows_equal, keys_of

BACKENDS: dict[str, Any] = {
    "reference": "reference",
    "flashinfer": FlashInferBackend(
        FlashInferStandIn(relaxed=True), mask="split", workspace_bytes=2**20
    ),
}


@dataclass(frozen=True)
class Batch:
    """Several requests over one pool of documents.

    Attributes:
        options: The model.
        prefix: Of all documents.
        pool: The documents' tokens.
        members: For each request, which documents it uses, in order.
        slots: For each request, a selection of its context's slots.
        queries: For each request its scoring tokens.
        prompts: For each request its prompt.
        backend: Name in BACKENDS.
        block_tokens: As in `recompute_many`.
    """

    options: ModelOptions
    prefix: list[int]
    pool: list[list[int]]
    members: list[list[int]]
    slots: list[list[int]]
    queries: list[list[int]]
    prompts: list[list[int]]
    backend: str
    block_tokens: int | None

    @property
    def model(self) -> PreTrainedModel:
        return shared_tiny_model(**dataclasses.asdict(self.options))

    def requests(self, docs: list[ifkv.DocumentCache]) -> list[list[ifkv.DocumentCache]]:
        return [[docs[i] for i in own] for own in self.members]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    options = draw(model_options())
    prefix = draw(prefixes())
    pool = draw(documents(max_documents=4, max_length=9))
    one = st.lists(st.integers(0, len(pool) - 1), min_size=1, max_size=4, unique=True)
    members = draw(st.lists(one, min_size=1, max_size=4))
    count = len(members)
    slots = []
    for own in members:
        total = len(prefix) + sum(len(pool[i]) for i in own)
        every = st.just(list(range(total)))
        slots.append(draw(st.one_of(st.just([]), every, slot_subsets(total))))
    return Batch(
        options=options,
        prefix=prefix,
        pool=pool,
        members=members,
        slots=slots,
        queries=draw(st.lists(queries(), min_size=count, max_size=count)),
        prompts=draw(st.lists(prompts(), min_size=count, max_size=count)),
        backend=draw(st.sampled_from(list(BACKENDS))),
        block_tokens=draw(st.sampled_from([None, None, 1, 3, 7])),
    )


@given(b=batches(), geometry=st.sampled_from(["global", "hl-tp"]))
def test_scores_together_are_scores_one_by_one(b: Batch, geometry: str) -> None:
    with ifkv.patch(b.model, backend=BACKENDS[b.backend]):
        docs = ifkv.prefill_documents(b.model, b.pool, prefix=b.prefix)
        caches = ifkv.stitch_many(b.model, b.requests(docs), geometry=geometry)
        together = ifkv.score_many(b.model, caches, b.queries, layers=[0, -1])
        for own, query, got in zip(b.requests(docs), b.queries, together, strict=True):
            alone = ifkv.stitch(b.model, own, geometry=geometry)
            want = ifkv.score(b.model, alone, query, layers=[0, -1])
            assert_close(got, want, what="scores", tolerance=1e-6)


@given(b=batches())
def test_recomputing_together_is_recomputing_one_by_one(b: Batch) -> None:
    with ifkv.patch(b.model, backend=BACKENDS[b.backend]):
        docs = ifkv.prefill_documents(b.model, b.pool, prefix=b.prefix)
        before = [(doc.keys.clone(), doc.values.clone()) for doc in docs]
        caches = ifkv.stitch_many(b.model, b.requests(docs))
        together = ifkv.recompute_many(
            b.model, caches, b.slots, prompts=b.prompts, block_tokens=b.block_tokens
        )
        for i, own in enumerate(b.requests(docs)):
            alone = ifkv.stitch(b.model, own)
            want = ifkv.recompute(b.model, alone, b.slots[i], prompt_ids=b.prompts[i])
            assert want is not None
            assert together[i] is not None
            assert_rows_equal(caches[i], alone, what=f"of request {i}")
            assert_close(together[i], want, what=f"logits of request {i}", tolerance=EXACT)
        for doc, (keys, values) in zip(docs, before, strict=True):
            assert_bit_equal(doc.keys, keys, what="a shared document's keys")
            assert_bit_equal(doc.values, values, what="a shared document's values")


@given(b=batches(), fused=st.booleans(), new=st.integers(1, 6), seed=st.integers(0, 3))
def test_answers_together_are_answers_one_by_one(
    b: Batch, fused: bool, new: int, seed: int
) -> None:
    ends = torch.randperm(97, generator=torch.Generator().manual_seed(seed))[:20].tolist()
    with ifkv.patch(b.model, backend=BACKENDS[b.backend]):
        docs = ifkv.prefill_documents(b.model, b.pool, prefix=b.prefix)
        caches = ifkv.stitch_many(b.model, b.requests(docs))
        ifkv.recompute_many(b.model, caches, b.slots, prompts=b.prompts if fused else None)
        heard: list[list[int]] = [[] for _ in caches]
        together = ifkv.generate_many(
            b.model,
            caches,
            b.prompts,
            max_new_tokens=new,
            eos_token_id=ends,
            emit=lambda i, token: heard[i].append(token),
        )
        for i, own in enumerate(b.requests(docs)):
            alone = ifkv.stitch(b.model, own)
            ifkv.recompute(b.model, alone, b.slots[i])
            want = ifkv.generate(
                b.model,
                alone,
                b.prompts[i],
                do_sample=False,
                max_new_tokens=new,
                eos_token_id=ends,
                pad_token_id=0,
            )
            assert together[i].tolist() == want[0, len(b.prompts[i]) :].tolist()
            assert heard[i] == together[i].tolist()
            assert caches[i].get_seq_length() == caches[i].context_length
            assert_rows_equal(caches[i], alone, what="after answering")


@given(b=batches())
def test_requests_do_not_see_one_another(b: Batch) -> None:
    """With every other cache of the allocation poisoned, a request's numbers stay."""
    with ifkv.patch(b.model, backend=BACKENDS[b.backend]):
        docs = ifkv.prefill_documents(b.model, b.pool, prefix=b.prefix)
        caches = ifkv.stitch_many(b.model, b.requests(docs))
        for other in caches[1:]:
            for layer in other.layers:
                layer.key_buffer.fill_(1e9)
                layer.value_buffer.fill_(1e9)
        got = ifkv.recompute_many(b.model, caches, b.slots, prompts=b.prompts)[0]
        alone = ifkv.stitch(b.model, b.requests(docs)[0])
        want = ifkv.recompute(b.model, alone, b.slots[0], prompt_ids=b.prompts[0])
        assert got is not None
        assert want is not None
        assert_close(got, want, what="logits", tolerance=EXACT)
        assert_rows_equal(caches[0], alone, what="beside poisoned caches")


@given(counts=st.lists(st.integers(0, 9), max_size=5), size=st.integers(1, 12))
def test_blocks_hold_every_row_once_in_order_within_their_size(
    counts: list[int], size: int
) -> None:
    blocks = list(cut_blocks(counts, size))
    rows = [(i, row) for block in blocks for i, cut in block for row in range(cut.start, cut.stop)]
    assert rows == [(i, row) for i, count in enumerate(counts) for row in range(count)]
    sizes = [sum(cut.stop - cut.start for _, cut in block) for block in blocks]
    assert all(n == size for n in sizes[:-1])
    assert all(0 < n <= size for n in sizes[-1:])


# --- what the properties do not draw -------------------------------------------------------------

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
