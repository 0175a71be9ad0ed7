"""Attention norms: how much of each context token flows to the query (2603.05353, eq. 7)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from ifkv.backends.base import Reduction
from ifkv.cache.checks import check_cache
from ifkv.cache.stitched import StitchedCache
from ifkv.errors import InvalidInputError
from ifkv.forward.graphs import run_to_attention
from ifkv.forward.layers import embed
from ifkv.models.decoder import DecoderView
from ifkv.models.rope import join_positions
from ifkv.patching.handle import handle_of
from ifkv.steps.pending_rows import PendingPass, pending_in
from ifkv.steps.query_pass import Measure, QueryView, ScoringPass
from ifkv.steps.requests import check_counts
from ifkv.steps.scoring_layers import chosen_layers
from ifkv.utils.checks import naming_request, token_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.forward.passes import AttentionPass


@torch.no_grad()
def score(
    model: PreTrainedModel,
    cache: StitchedCache,
    query_ids: Sequence[int] | Tensor,
    *,
    layers: Sequence[int] | None = None,
    reduction: Reduction = "l2",
) -> Tensor:
    """Compute the attention norm of every context slot under the query.

    The query runs over the stitched cache in the cache's geometry, causally behind the context, up
    to the deepest scoring layer. With ``a[i, j]`` the attention of query token i to slot j,
    averaged over heads, a layer's norm is ``||a[:, j]||_2`` (``"l2"``, as in the paper's released
    code) or ``sum_i a[i, j]`` (``"sum"``, as in its equation). The result is the mean over scoring
    layers.

    Args:
        model: A patched model.
        cache: A stitched cache in any geometry. It is not changed; rows appended behind its
            context are ignored.
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
    return _norms(model, [Scoring.checked(model, cache, query_ids)], layers, reduction)[0]


def score_many(
    model: PreTrainedModel,
    caches: Sequence[StitchedCache],
    queries: Sequence[Sequence[int] | Tensor],
    *,
    layers: Sequence[int] | None = None,
    reduction: Reduction = "l2",
) -> list[Tensor]:
    """Compute the attention norms of several requests, their queries in one pass.

    Args:
        model: A patched model.
        caches: For each request its cache. Scoring changes none, so one cache may stand for
            several requests.
        queries: For each request its scoring tokens.
        layers: As in [ifkv.score][], the same for all.
        reduction: As in [ifkv.score][].

    Returns:
        For each request what [ifkv.score][] returns.

    Raises:
        InvalidInputError: Not as many queries as caches, and as of [ifkv.score][], naming the
            request. All are checked before any work.
        NotPatchedError: The model is not patched.
        FingerprintMismatchError: A cache belongs to another model.

    Examples:
        >>> import ifkv
        >>> from ifkv.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> with ifkv.patch(model):
        ...     a, b, c = ifkv.prefill_documents(model, [[5, 6, 7], [8, 9], [10, 11]], prefix=[1])
        ...     caches = ifkv.stitch_many(model, [[a, b, c], [b, a]])
        ...     scores = ifkv.score_many(model, caches, [[12, 13], [14]])
        >>> [len(one) for one in scores]
        [8, 6]
    """
    check_counts(len(caches), queries=queries)
    jobs = []
    for index, (cache, query) in enumerate(zip(caches, queries, strict=True)):
        with naming_request(index):
            jobs.append(Scoring.checked(model, cache, query))
    return _norms(model, jobs, layers, reduction)


def _norms(
    model: PreTrainedModel,
    jobs: Sequence[Scoring],
    layers: Sequence[int] | None,
    reduction: Reduction,
) -> list[Tensor]:
    """Compute the attention norms of one or several checked requests; see `score`."""
    norm = attention_norm(reduction)
    chosen = chosen_layers(DecoderView(model).num_layers, layers)
    if not jobs:
        return []
    return [mean_over_layers(norms) for norms in run_scorings(model, jobs, chosen, norm)]


def mean_over_layers(norms: Sequence[Tensor]) -> Tensor:
    """Compute a request's scores from its layers' norms, float32 ``[T]``."""
    return torch.stack(list(norms)).mean(dim=0).to(torch.float32)


def attention_norm(reduction: Reduction, *, by_values: bool = False) -> Measure:
    """Return the measure of `score`: the attention norm of each slot in one layer, ``[T]``.

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
        layers: The layers to measure in, ascending, counted from 0.
        measure: Called once in each of these layers.

    Returns:
        The measure's results, layer by layer.

    Raises:
        InvalidInputError: Bad ids, or more tokens than the model has positions.
    """
    return run_scorings(model, [Scoring.checked(model, cache, query_ids)], layers, measure)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Scoring:
    """Query of one request, checked and ready to run.

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
        """Check the arguments of `measure_query`; raises its errors."""
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
        layers: The layers to measure in, ascending, counted from 0.
        measure: Called once for each request in each of these layers.

    Returns:
        For each request the measure's results, layer by layer.
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
        positions = join_positions((both.positions, positions))
        hidden = torch.cat((both.hidden, hidden), dim=1)
    rotation = handle.rope.rotation(positions, hidden.dtype)
    entering = run_to_attention(model, handle.captures, hidden, positions, rotation, run, deepest)
    if both is not None:
        both.keep_progress(entering, deepest)
    return scoring.measured
