"""Several requests in one pass: their rows share every read of the weights.

Requests of different lengths over different documents lie side by side, without padding. What
belongs to a request alone, its attention, is planned and run for it alone (or by the backend for
all of them in one call); what is done row by row, which is nearly everything else, is done once for
all rows. The results are those of one request after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ifkv.backends.base import Reduction
from ifkv.cache.stitched import StitchedCache
from ifkv.errors import InvalidInputError
from ifkv.models.decoder import DecoderView
from ifkv.steps.recompute import run_recomputations
from ifkv.steps.recompute_request import Recomputation
from ifkv.steps.score import (
    Scoring,
    attention_norm,
    chosen_layers,
    mean_over_layers,
    run_scorings,
)
from ifkv.utils.checks import naming_request

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def score_many(
    model: PreTrainedModel,
    caches: Sequence[StitchedCache],
    queries: Sequence[Sequence[int] | Tensor],
    *,
    layers: Sequence[int] | None = None,
    reduction: Reduction = "l2",
) -> list[Tensor]:
    """Attention norms of several requests, their queries in one pass.

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
    chosen, norm = chosen_layers(DecoderView(model).num_layers, layers), attention_norm(reduction)
    if not jobs:
        return []
    return [mean_over_layers(norms) for norms in run_scorings(model, jobs, chosen, norm)]


def recompute_many(
    model: PreTrainedModel,
    caches: Sequence[StitchedCache],
    slots: Sequence[Sequence[int] | Tensor],
    *,
    prompts: Sequence[Sequence[int] | Tensor | None] | None = None,
    block_tokens: int | None = None,
) -> list[Tensor | None]:
    """Recompute slots of several requests, and their prompts, in one pass.

    Args:
        model: A patched model.
        caches: For each request a cache of its own.
        slots: For each request the slots to recompute.
        prompts: For each request the tokens to be answered, or None; None if there are none.
        block_tokens: Run at most this many rows at once, over all requests; changes nothing but
            the memory needed.

    Returns:
        For each request what [ifkv.recompute][] returns.

    Raises:
        InvalidInputError: Not as many slots or prompts as caches, a cache given twice, and as of
            [ifkv.recompute][], naming the request. All are checked before any cache changes.
        NotPatchedError: The model is not patched.
        GeometryError: A cache's geometry is not global.
        FingerprintMismatchError: A cache belongs to another model.

    Examples:
        >>> import ifkv
        >>> from ifkv.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> with ifkv.patch(model):
        ...     a, b, c = ifkv.prefill_documents(model, [[5, 6, 7], [8, 9], [10, 11]], prefix=[1])
        ...     caches = ifkv.stitch_many(model, [[a, b, c], [b, a]])
        ...     logits = ifkv.recompute_many(model, caches, [[4, 6], [3]], prompts=[[12], [13, 14]])
        >>> [cache.get_seq_length() for cache in caches]
        [9, 8]
    """
    given = [None] * len(caches) if prompts is None else prompts
    check_counts(len(caches), slots=slots, prompts=given)
    check_private(caches)
    jobs = []
    for index, (cache, own, prompt) in enumerate(zip(caches, slots, given, strict=True)):
        with naming_request(index):
            jobs.append(Recomputation.checked(model, cache, own, prompt))
    return run_recomputations(model, jobs, block_tokens)


def check_counts(count: int, **given: Sequence[Any]) -> None:
    """Refuse lists that do not have one entry for each request.

    Raises:
        InvalidInputError: One has more or fewer.
    """
    for name, values in given.items():
        if isinstance(values, str | Mapping | AbstractSet) or not hasattr(values, "__len__"):
            raise InvalidInputError(
                f"{name} is of type {type(values).__name__}; a list with one entry for each of the "
                f"{count} requests is wanted."
            )
        if len(values) != count:
            raise InvalidInputError(
                f"{name} has {len(values)} entries for {count} requests; give one each."
            )


def check_private(caches: Sequence[StitchedCache]) -> None:
    """Refuse one cache for two requests that would both write into it.

    Raises:
        InvalidInputError: A cache is there twice.
    """
    seen: dict[int, int] = {}
    for index, cache in enumerate(caches):
        first = seen.setdefault(id(cache), index)
        if first != index:
            raise InvalidInputError(
                f"requests {first} and {index} have the same cache, but each writes into its own; "
                "stitch one for each (documents may be shared)."
            )
