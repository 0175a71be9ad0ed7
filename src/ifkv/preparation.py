"""Everything between a question and its first token: stitch, score, select, recompute."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ifkv.answer import Prepared
from ifkv.cost import ModelShape, mean_position, speedup_bound
from ifkv.documents import DocumentCache
from ifkv.recomputation import recompute
from ifkv.reordering import reorder as reorder_documents
from ifkv.scoring import default_layers, score
from ifkv.selection import select
from ifkv.stitching import stitch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.stitched_cache import StitchedCache


class Stopwatch:
    """Times named steps; on a GPU it waits for them, so that a step's time is its own.

    Attributes:
        timings: Seconds of each step.

    Args:
        model: Whose device is waited for.
    """

    def __init__(self, model: PreTrainedModel):
        self.timings: dict[str, float] = {}
        self._device = model.device
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block as a step of this name."""
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.timings[name] = time.perf_counter() - start

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self._started


def prepare(
    model: PreTrainedModel,
    documents: Sequence[DocumentCache],
    prompt_ids: list[int],
    timed: Stopwatch,
    *,
    ratio: float,
    reorder: bool,
    layers: Sequence[int] | None,
) -> Prepared:
    """Stitch documents, repair them for a prompt, and run the prompt.

    Args:
        model: A patched model.
        documents: Documents it made behind one prefix.
        prompt_ids: The prompt's tokens; all of them are scored.
        timed: Started when the question arrived.
        ratio: Recompute ratio; at 1 nothing has to be scored.
        reorder: Whether to put the documents the prompt finds most in last.
        layers: Scoring layers, as in :func:`ifkv.score`.

    Returns:
        The cache with the prompt in it, and the first token's logits.

    Raises:
        InvalidInputError: As of the steps.
    """
    order = None
    if reorder:
        with timed("reorder"):
            order = reorder_documents(model, documents, prompt_ids, ratio=ratio, layers=layers)
    with timed("stitch"):
        cache = stitch(model, documents, order=order)
    scores, slots = None, torch.zeros(0, dtype=torch.long)
    if ratio == 1:
        slots = torch.arange(cache.document_slices[0].stop, cache.context_length)
    elif ratio > 0:
        with timed("score"):
            scores = score(model, cache, prompt_ids, layers=layers)
        with timed("select"):
            slots = select(cache, scores, ratio=ratio)
    with timed("recompute and prompt"):
        logits = recompute(model, cache, slots, prompt_ids=prompt_ids)
    assert logits is not None
    return Prepared(
        cache=cache,
        prompt_ids=prompt_ids,
        logits=logits,
        scores=scores,
        slots=slots,
        timings=timed.timings,
        ttft_seconds=timed.seconds,
        speedup_bound=_bound(
            model, cache, slots, len(prompt_ids), layers, (scores is not None) + reorder
        ),
    )


def _bound(
    model: PreTrainedModel,
    cache: StitchedCache,
    slots: Tensor,
    query_length: int,
    layers: Sequence[int] | None,
    passes: int,
) -> float:
    """S(r) of a request that has run so many scoring passes."""
    shape = ModelShape.of(model)
    deepest = 0
    if passes:
        chosen = default_layers(shape.num_layers) if layers is None else layers
        deepest = max(layer % shape.num_layers for layer in chosen) + 1
    return speedup_bound(
        shape,
        context_length=cache.context_length,
        query_length=query_length,
        ratio=len(slots) / cache.context_length,
        scoring_layers=deepest * passes,
        position=mean_position(slots, cache.context_length),
    )
