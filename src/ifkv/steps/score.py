"""Attention norms: how much of each context token flows to the query (2603.05353, eq. 7)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from ifkv.backends.base import Reduction
from ifkv.cache.stitched import StitchedCache, check_cache
from ifkv.errors import InvalidInputError
from ifkv.forward.graphs import run_to_attention
from ifkv.forward.layers import embed
from ifkv.models.decoder import DecoderView
from ifkv.patching.handle import handle_of
from ifkv.steps.pending_rows import PendingPass, pending_in
from ifkv.steps.query_pass import Measure, QueryView, ScoringPass
from ifkv.utils.checks import token_tensor, whole_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.forward.passes import AttentionPass

__all__ = [
    "DEFAULT_DEPTH",
    "Measure",
    "QueryView",
    "Scoring",
    "attention_norm",
    "chosen_layers",
    "default_layers",
    "mean_over_layers",
    "measure_query",
    "run_scorings",
    "score",
]

# Share of the depth whose layers score when the caller does not say: the paper's layers 22 to 25
# of 40 (Qwen3-14B) and their neighbours in shallower models.
DEFAULT_DEPTH = (0.55, 0.70)


def default_layers(depth: int) -> list[int]:
    """The scoring layers of a model with ``depth`` layers.

    >>> default_layers(40), default_layers(3)
    ([22, 23, 24, 25, 26, 27], [1, 2])
    """
    start = math.floor(DEFAULT_DEPTH[0] * depth)
    stop = max(start + 1, math.ceil(DEFAULT_DEPTH[1] * depth))
    return list(range(start, stop))


@torch.no_grad()
def score(
    model: PreTrainedModel,
    cache: StitchedCache,
    query_ids: Sequence[int] | Tensor,
    *,
    layers: Sequence[int] | None = None,
    reduction: Reduction = "l2",
) -> Tensor:
    """Attention norm of every context slot under the query, in the cache's own geometry.

    The query runs over the stitched cache, causally behind the context, as far as the deepest
    scoring layer. With ``a[i, j]`` the attention of query token i to slot j, averaged over heads,
    a layer's norm is ``||a[:, j]||_2`` (``"l2"``, as in the paper's released code) or
    ``sum_i a[i, j]`` (``"sum"``, as in its equation); the result is the mean over scoring layers.

    Args:
        model: A patched model.
        cache: A stitched cache in any geometry; it is not changed, and rows appended behind its
            context are not looked at.
        query_ids: The scoring tokens: the question, or the whole prompt.
        layers: Scoring layers, negative ones counted from the end; by default those at 55 to 70 %
            of the depth.
        reduction: ``"l2"`` or ``"sum"``.

    Returns:
        Float32 ``[T]``, on the model's device.

    Raises:
        NotPatchedError: The model is not patched.
        InvalidInputError: Bad ids, layers or reduction, or a context and query that together are
            longer than the model's positions.
        FingerprintMismatchError: The cache belongs to another model.
    """
    norm = attention_norm(reduction)
    check_cache(model, cache)
    chosen = chosen_layers(DecoderView(model).num_layers, layers)
    return mean_over_layers(measure_query(model, cache, query_ids, chosen, norm))


def mean_over_layers(norms: Sequence[Tensor]) -> Tensor:
    """A request's scores from its layers' norms, float32 ``[T]``."""
    return torch.stack(list(norms)).mean(dim=0).to(torch.float32)


def attention_norm(reduction: Reduction, *, by_values: bool = False) -> Measure:
    """The measure of `score`: the attention norm of each slot in one layer, ``[T]``.

    Args:
        reduction: Over query tokens.
        by_values: Multiply it by the size of the slot's values, as
            `Backend.attention_norm` does.

    Raises:
        InvalidInputError: There is no such reduction.
    """
    if reduction not in get_args(Reduction):
        raise InvalidInputError(
            f"reduction {reduction!r} is unknown; choose one of {', '.join(get_args(Reduction))}."
        )

    def measure(view: QueryView) -> Tensor:
        norms = view.backend.attention_norm(
            view.query,
            view.context_keys,
            view.logsumexp,
            view.plan,
            view.spec,
            reduction=reduction,
            values=view.context_values if by_values else None,
        )
        rescaled = by_values and view.value_scale != 1
        return norms * view.value_scale if rescaled else norms

    return measure


@torch.no_grad()
def measure_query(
    model: PreTrainedModel,
    cache: StitchedCache,
    query_ids: Sequence[int] | Tensor,
    layers: Sequence[int],
    measure: Measure,
) -> list[Tensor]:
    """Run the query over a stitched cache, as `score` does, and measure in some layers.

    Args:
        model: A patched model.
        cache: A stitched cache in any geometry; it is not changed.
        query_ids: The scoring tokens.
        layers: Where to measure, ascending, counted from 0.
        measure: Called once in each of these layers.

    Returns:
        What it returned, layer by layer.

    Raises:
        InvalidInputError: Bad ids, or more tokens than the model has positions.
    """
    return run_scorings(model, [Scoring.checked(model, cache, query_ids)], layers, measure)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Scoring:
    """One request's query, checked and ready to run.

    Attributes:
        cache: Its cache.
        query: The query's tokens, on the CPU.
    """

    cache: StitchedCache
    query: Tensor

    @classmethod
    def checked(
        cls, model: PreTrainedModel, cache: StitchedCache, query_ids: Sequence[int] | Tensor
    ) -> Scoring:
        """From the arguments of `measure_query`; raises its errors."""
        handle = check_cache(model, cache)
        query = token_tensor(model, query_ids, "the query")
        handle.rope.check_length(cache.query_position + len(query), "context and query")
        return cls(cache, query)


@torch.no_grad()
def run_scorings(
    model: PreTrainedModel, jobs: Sequence[Scoring], layers: Sequence[int], measure: Measure
) -> list[list[Tensor]]:
    """Run the queries of one or several requests together; see `measure_query`.

    Args:
        model: A patched model.
        jobs: The requests, at least one.
        layers: Where to measure, ascending, counted from 0.
        measure: Called once for each request in each of these layers.

    Returns:
        For each request what the measure returned, layer by layer.
    """
    handle, device = handle_of(model), model.device
    starts = [job.cache.query_position for job in jobs]
    own = [
        torch.arange(start, start + len(job.query), device=device)
        for start, job in zip(starts, jobs, strict=True)
    ]
    positions = torch.cat(own)
    hidden = embed(model, torch.cat([job.query for job in jobs]).to(device))
    caches, deepest = [job.cache for job in jobs], layers[-1]
    scoring = ScoringPass(handle, caches, layers, own, measure)
    run: AttentionPass = scoring
    both = None
    if unfinished := pending_in(model, caches, deepest):
        run = both = PendingPass(model, handle, unfinished, scoring, deepest)
        positions = torch.cat((both.positions, positions), dim=-1)
        hidden = torch.cat((both.hidden, hidden), dim=1)
    rotation = handle.rope.rotation(positions, hidden.dtype)
    entering = run_to_attention(model, handle.captures, hidden, positions, rotation, run, deepest)
    if both is not None:
        both.keep_progress(entering, deepest)
    return scoring.measured


def chosen_layers(depth: int, layers: Sequence[int] | None) -> list[int]:
    """Scoring layers, checked, ascending and counted from 0; the default ones for None."""
    if layers is None:
        return default_layers(depth)
    given = whole_numbers(layers, "layers")
    chosen = sorted({layer + depth if layer < 0 else layer for layer in given})
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth:
        raise InvalidInputError(
            f"layers is {given}, but must name at least one of the model's {depth} layers: "
            f"0 to {depth - 1}, or -{depth} to -1 from the end."
        )
    return chosen
