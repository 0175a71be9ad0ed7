"""Everything between a question and its first token: stitch, score, select, recompute."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ifkv.answer import Prepared
from ifkv.cost import Cost, ModelShape, mean_position, scoring_cost, speedup_bound
from ifkv.documents import DocumentCache
from ifkv.recomputation import recompute
from ifkv.reordering import reorder as reorder_documents
from ifkv.scoring import chosen_layers
from ifkv.selectors import Budget, Request, Selection, Selector, sentence_groups
from ifkv.stitching import stitch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ifkv.layer_loading import LayerLoader
    from ifkv.stitched_cache import StitchedCache


# Share of the context that counts as found by a question when documents are reordered and the
# budget is not a ratio.
REORDER_RATIO = 0.15


class Stopwatch:
    """Times named steps; on a GPU it waits for them, so that a step's time is its own.

    While a step waits for a store to read, that time is ``load``'s and not the step's.

    Attributes:
        timings: Seconds of each step; a step that is run twice has the sum.
        loaders: What reads the documents in the background, if anything does.

    Args:
        model: Whose device is waited for.
        since: Count :attr:`seconds` from when this one was made.
    """

    def __init__(self, model: PreTrainedModel, since: Stopwatch | None = None):
        self.timings: dict[str, float] = {}
        self.loaders: list[LayerLoader] = []
        self._device = model.device
        self._started: float = time.perf_counter() if since is None else since._started

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block as a step of this name."""
        start, waited = time.perf_counter(), self._waited
        try:
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        finally:
            waited = self._waited - waited
            self._add(name, time.perf_counter() - start - waited)
            if waited:
                self._add("load", waited)

    def _add(self, name: str, seconds: float) -> None:
        self.timings[name] = self.timings.get(name, 0.0) + seconds

    @property
    def _waited(self) -> float:
        return sum(loader.wait_seconds for loader in self.loaders)

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self._started


def prepare(
    model: PreTrainedModel,
    documents: Sequence[DocumentCache],
    prompt_ids: list[int],
    question_ids: list[int],
    timed: Stopwatch,
    *,
    budget: Budget,
    reorder: bool,
    selector: Selector,
    layers: Sequence[int] | None,
    tokenizer: Any,
    kv_dtype: torch.dtype | None = None,
) -> Prepared:
    """Stitch documents, repair them for a prompt, and run the prompt.

    Args:
        model: A patched model.
        documents: Documents it made behind one prefix.
        prompt_ids: The prompt's tokens.
        question_ids: The bare question's.
        timed: Started when the question arrived.
        budget: How many slots to recompute; nothing has to be scored for all or none.
        reorder: Whether to put the documents the prompt finds most in last. What counts as found
            is the budget's ratio, or :data:`REORDER_RATIO` where it has none.
        selector: What chooses the slots.
        layers: Scoring layers for reordering, as in :func:`ifkv.score`.
        tokenizer: Tells sentences apart, where the budget smooths by them.
        kv_dtype: Of the request's cache, as in :func:`ifkv.stitch`.

    Returns:
        The cache with the prompt in it, and the first token's logits.

    Raises:
        InvalidInputError: As of the steps.
    """
    order, spent = None, Cost()
    shape = ModelShape.of(model)
    if reorder:
        ratio = reorder_ratio(budget)
        with timed("reorder"):
            order = reorder_documents(
                model, documents, prompt_ids, ratio=ratio, layers=layers, kv_dtype=kv_dtype
            )
    with timed("stitch"):
        cache = stitch(model, documents, order=order, kv_dtype=kv_dtype)
    timed.loaders = loaders_of([cache])
    if reorder:
        scoring = chosen_layers(shape.num_layers, layers)
        spent += scoring_cost(shape, len(prompt_ids), cache.context_length, scoring)
    with timed("select"):
        groups = sentence_groups(tokenizer, cache) if budget.sentences else None
        request = Request(prompt_ids, question_ids, documents, groups)
        selection = selector.select(model, cache, request, budget)
        spent += selection.cost
    with timed("recompute and prompt"):
        logits = recompute(model, cache, selection.slots, prompt_ids=prompt_ids)
    assert logits is not None
    return finished(model, cache, prompt_ids, logits, selection, selector, spent, timed)


def reorder_ratio(budget: Budget) -> float:
    """Share of the context that counts as found when documents are reordered."""
    return REORDER_RATIO if budget.ratio is None else budget.ratio


def loaders_of(caches: Sequence[StitchedCache]) -> list[LayerLoader]:
    """What reads the documents of these caches in the background."""
    return [cache.loader for cache in caches if cache.loader is not None]


def finished(
    model: PreTrainedModel,
    cache: StitchedCache,
    prompt_ids: list[int],
    logits: Tensor,
    selection: Selection,
    selector: Selector,
    spent: Cost,
    timed: Stopwatch,
) -> Prepared:
    """What is known once a request's first token is decided.

    Args:
        model: The model.
        cache: The repaired cache with the prompt in it.
        prompt_ids: The prompt's tokens.
        logits: Of the first answered token, ``[vocabulary]``.
        selection: What was recomputed.
        selector: What chose it.
        spent: What choosing has cost, reordering included.
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
        speedup_bound=speedup_bound(
            ModelShape.of(model),
            context_length=cache.context_length,
            query_length=len(prompt_ids),
            ratio=len(selection.slots) / cache.context_length,
            position=mean_position(selection.slots, cache.context_length),
            selection_flops=spent.flops,
        ),
        selector=str(selector),
        selection_cost=spent,
    )
