"""Everything between several questions and their first tokens, step by step in one pass each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ifkv.answer import Prepared
from ifkv.batching import recompute_many, score_many
from ifkv.cost import Cost, ModelShape, scoring_cost
from ifkv.documents import DocumentCache
from ifkv.preparation import Stopwatch, finished, loaders_of, reorder_ratio
from ifkv.reordering import order_by_hits
from ifkv.scoring import chosen_layers
from ifkv.selectors import Budget, Request, Selector, sentence_groups
from ifkv.stitching import stitch_many

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def prepare_many(
    model: PreTrainedModel,
    documents: Sequence[Sequence[DocumentCache]],
    prompts: Sequence[list[int]],
    questions: Sequence[list[int]],
    timed: Stopwatch,
    *,
    budget: Budget,
    reorder: bool,
    selector: Selector,
    layers: Sequence[int] | None,
    tokenizer: Any,
    kv_dtype: torch.dtype | None = None,
) -> list[Prepared]:
    """Prepare several requests as :func:`ifkv.preparation.prepare` does one.

    Args:
        model: A patched model.
        documents: For each request its documents.
        prompts: For each request its prompt's tokens.
        questions: For each request the bare question's.
        timed: Started when the questions arrived; a step's seconds are those of all requests.
        budget: As in ``prepare``.
        reorder: As in ``prepare``.
        selector: As in ``prepare``.
        layers: As in ``prepare``.
        tokenizer: As in ``prepare``.
        kv_dtype: As in ``prepare``.

    Returns:
        For each request what ``prepare`` returns.
    """
    with timed("load"):
        _read_shared(documents, every=reorder)
    orders = None
    spent = [Cost() for _ in documents]
    if reorder:
        with timed("reorder"):
            orders, spent = _orders(
                model, documents, prompts, reorder_ratio(budget), layers, kv_dtype
            )
    with timed("stitch"):
        caches = stitch_many(model, documents, orders=orders, kv_dtype=kv_dtype)
    timed.loaders = loaders_of(caches)
    with timed("select"):
        requests = [
            Request(prompt, question, own, groups)
            for prompt, question, own, groups in zip(
                prompts,
                questions,
                documents,
                [sentence_groups(tokenizer, c) if budget.sentences else None for c in caches],
                strict=True,
            )
        ]
        selections = selector.select_many(model, caches, requests, budget)
        spent = [before + found.cost for before, found in zip(spent, selections, strict=True)]
    with timed("recompute and prompt"):
        logits = recompute_many(
            model, caches, [found.slots for found in selections], prompts=prompts
        )
    prepared = []
    for cache, prompt, row, found, cost in zip(
        caches, prompts, logits, selections, spent, strict=True
    ):
        assert row is not None
        prepared.append(finished(model, cache, prompt, row, found, selector, cost, timed))
    return prepared


def _orders(
    model: PreTrainedModel,
    documents: Sequence[Sequence[DocumentCache]],
    prompts: Sequence[list[int]],
    ratio: float,
    layers: Sequence[int] | None,
    kv_dtype: torch.dtype | None,
) -> tuple[list[list[int]], list[Cost]]:
    """Each request's order of documents, as :func:`ifkv.reorder` finds it, and what that cost."""
    caches = stitch_many(model, documents, geometry="hl-tp", kv_dtype=kv_dtype)
    scores = score_many(model, caches, prompts, layers=layers)
    shape = ModelShape.of(model)
    chosen = chosen_layers(shape.num_layers, layers)
    orders = [order_by_hits(cache, own, ratio) for cache, own in zip(caches, scores, strict=True)]
    costs = [
        scoring_cost(shape, len(prompt), cache.context_length, chosen)
        for cache, prompt in zip(caches, prompts, strict=True)
    ]
    return orders, costs


def _read_shared(requests: Sequence[Sequence[DocumentCache]], *, every: bool) -> None:
    """Bring documents that are read more than once into memory: a store would read them anew.

    Args:
        requests: For each request its documents.
        every: Whether each request reads its documents twice.
    """
    uses = Counter(id(document) for documents in requests for document in documents)
    for documents in requests:
        for document in documents:
            if document.lazy and (every or uses[id(document)] > 1):
                _ = document.keys
