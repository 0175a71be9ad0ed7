"""Everything between questions and their first tokens: stitch, score, select, recompute.

Every step takes a list of requests and runs them in one pass; a single question is a list of one.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ifkv.cache.stitch import stitch_many
from ifkv.cost import Cost, ModelShape, mean_position, scoring_cost, speedup_bound
from ifkv.documents.cache import DocumentCache
from ifkv.selectors import Budget, Request, Selection, Selector, sentence_groups
from ifkv.session.answer import Prepared
from ifkv.session.stopwatch import Stopwatch
from ifkv.steps.recompute import recompute_many
from ifkv.steps.reorder import order_by_hits
from ifkv.steps.score import score_many
from ifkv.steps.scoring_layers import chosen_layers

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache

# Share of the context that counts as found by a question when documents are reordered and the
# budget is not a ratio.
REORDER_RATIO = 0.15


@dataclasses.dataclass(frozen=True, eq=False)
class PrepareRequest:
    """A question in token ids, with what it is asked over.

    Attributes:
        documents: Documents that the model made behind one prefix.
        prompt_ids: The prompt's tokens.
        question_ids: The bare question's.
        budget: How many slots to recompute; nothing has to be scored for all or none.
    """

    documents: Sequence[DocumentCache]
    prompt_ids: list[int]
    question_ids: list[int]
    budget: Budget


@dataclasses.dataclass(frozen=True, eq=False)
class PrepareOptions:
    """Options of preparing questions.

    Attributes:
        selector: What chooses the slots.
        reorder: Whether to put the documents that the prompt finds most in last. What counts as
            found is the budget's ratio, or `REORDER_RATIO` where it has none.
        layers: Scoring layers for reordering, as in [ifkv.score][].
        tokenizer: Tells sentences apart, where a budget smooths by them.
        kv_dtype: Of the requests' caches, as in [ifkv.stitch][].
    """

    selector: Selector
    reorder: bool = False
    layers: Sequence[int] | None = None
    tokenizer: Any = None
    kv_dtype: torch.dtype | None = None


def prepare(
    model: PreTrainedModel, asked: Sequence[PrepareRequest], timed: Stopwatch, how: PrepareOptions
) -> list[Prepared]:
    """Stitch each question's documents, repair them for its prompt, and run the prompt.

    Args:
        model: A patched model.
        asked: The questions.
        timed: Started when they arrived; a step's seconds are those of all questions.
        how: How to prepare them.

    Returns:
        For each question the cache with the prompt in it, and the first token's logits.

    Raises:
        InvalidInputError: As of the steps.
    """
    documents, prompts = [one.documents for one in asked], [one.prompt_ids for one in asked]
    with timed("load"):
        _read_shared(documents, every=how.reorder)
    orders = None
    spent = [Cost() for _ in asked]
    if how.reorder:
        with timed("reorder"):
            orders, spent = find_orders(model, asked, layers=how.layers, kv_dtype=how.kv_dtype)
    with timed("stitch"):
        caches = stitch_many(model, documents, orders=orders, kv_dtype=how.kv_dtype)
    timed.loaders = [cache.loader for cache in caches if cache.loader is not None]
    with timed("select"):
        requests = [Request(one.prompt_ids, one.question_ids, one.documents) for one in asked]
        budgets = [one.budget for one in asked]
        selections = choose(model, caches, requests, budgets, how.selector, how.tokenizer)
    with timed("recompute and prompt"):
        slots = [found.slots for found in selections]
        logits = recompute_many(model, caches, slots, prompts=prompts)
    prepared, shape = [], ModelShape.of(model)
    for cache, prompt, row, found, before in zip(
        caches, prompts, logits, selections, spent, strict=True
    ):
        assert row is not None
        cost = before + found.cost
        bound = speedup_bound(
            shape,
            context_length=cache.context_length,
            query_length=len(prompt),
            ratio=len(found.slots) / cache.context_length,
            position=mean_position(found.slots, cache.context_length),
            selection_flops=cost.flops,
        )
        chosen = dataclasses.replace(found, cost=cost)
        prepared.append(prepared_of(cache, prompt, row, chosen, how.selector, bound, timed))
    return prepared


def reorder_ratio(budget: Budget) -> float:
    """Return the share of the context that counts as found when documents are reordered."""
    return REORDER_RATIO if budget.ratio is None else budget.ratio


def find_orders(
    model: PreTrainedModel,
    asked: Sequence[PrepareRequest],
    *,
    layers: Sequence[int] | None = None,
    kv_dtype: torch.dtype | None = None,
) -> tuple[list[list[int]], list[Cost]]:
    """Find each question's order of documents, as [ifkv.reorder][] does, and what it cost.

    Args:
        model: A patched model.
        asked: The questions.
        layers: Scoring layers, as in [ifkv.score][].
        kv_dtype: Of the caches that are scored, as in [ifkv.stitch][].
    """
    prompts = [one.prompt_ids for one in asked]
    caches = stitch_many(
        model, [one.documents for one in asked], geometry="hl-tp", kv_dtype=kv_dtype
    )
    scores = score_many(model, caches, prompts, layers=layers)
    shape = ModelShape.of(model)
    chosen = chosen_layers(shape.num_layers, layers)
    orders = [
        order_by_hits(cache, own, reorder_ratio(one.budget))
        for cache, own, one in zip(caches, scores, asked, strict=True)
    ]
    costs = [
        scoring_cost(shape, len(prompt), cache.context_length, chosen)
        for cache, prompt in zip(caches, prompts, strict=True)
    ]
    return orders, costs


def choose(
    model: PreTrainedModel,
    caches: Sequence[StitchedCache],
    requests: Sequence[Request],
    budgets: Sequence[Budget],
    selector: Selector,
    tokenizer: Any,
) -> list[Selection]:
    """Choose each request's slots.

    Args:
        model: A patched model.
        caches: For each request its cache.
        requests: The requests; sentences are found here, where a budget smooths by them.
        budgets: For each request its budget.
        selector: What chooses.
        tokenizer: Tells sentences apart.
    """
    grouped = [
        dataclasses.replace(request, groups=sentence_groups(tokenizer, cache))
        if budget.sentences
        else request
        for request, cache, budget in zip(requests, caches, budgets, strict=True)
    ]
    return selector.select_many(model, caches, grouped, budgets)


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


def prepared_of(
    cache: StitchedCache,
    prompt_ids: list[int],
    logits: Tensor,
    selection: Selection,
    selector: Selector,
    bound: float,
    timed: Stopwatch,
) -> Prepared:
    """Collect the results of a request whose first token is decided.

    Args:
        cache: The repaired cache with the prompt in it.
        prompt_ids: The prompt's tokens.
        logits: Of the first answered token, ``[vocabulary]``.
        selection: What was recomputed; its cost includes reordering.
        selector: What chose it.
        bound: The bound on the speedup, as in `ifkv.session.answer.Answer`.
        timed: Started when the question arrived.
    """
    return Prepared(
        cache=cache,
        prompt_ids=prompt_ids,
        logits=logits,
        scores=selection.scores,
        attention=selection.attention,
        slots=selection.slots,
        timings=dict(timed.timings),
        ttft_seconds=timed.seconds,
        speedup_bound=bound,
        selector=str(selector),
        selection_cost=selection.cost,
    )
