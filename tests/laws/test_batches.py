"""Law 28: a batch of B requests is B requests, whatever their lengths and shared documents."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given
from transformers import PreTrainedModel

import ifkv
from flashinfer_standin import FlashInferStandIn
from ifkv.backends.flashinfer import FlashInferBackend
from ifkv.steps.recompute import cut_blocks
from ifkv.testing import assert_bit_equal, assert_close, shared_tiny_model
from ifkv.testing.strategies import (
    ModelOptions,
    documents,
    model_options,
    prefixes,
    prompts,
    queries,
    slot_subsets,
)
from scenario import EXACT, assert_rows_equal

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
