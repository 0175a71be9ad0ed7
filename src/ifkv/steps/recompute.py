"""Recompute selected slots under the full causal mask, in one forward with the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ifkv.cache.stitched import StitchedCache
from ifkv.forward.graphs import run_to_attention
from ifkv.forward.layers import row_logits, run_layers
from ifkv.forward.picture_rows import side_by_side
from ifkv.models.decoder import DecoderView
from ifkv.patching.handle import PatchHandle, handle_of
from ifkv.steps.partial_depth import run_by_depth
from ifkv.steps.recompute_request import Recomputation
from ifkv.steps.requests import check_counts, check_private
from ifkv.steps.rows_pass import RowsPass
from ifkv.utils.checks import check_positive, naming_request

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def recompute(
    model: PreTrainedModel,
    cache: StitchedCache,
    slots: Sequence[int] | Tensor,
    *,
    prompt_ids: Sequence[int] | Tensor | None = None,
    block_tokens: int | None = None,
    depths: Sequence[int] | Tensor | None = None,
) -> Tensor | None:
    """Recompute the keys and values at the given slots, in place, through all layers.

    In every layer the rows' new keys and values are written first; then each row attends to the
    whole mixed cache up to its own position. With every slot given, the cache equals a full
    prefill. With a prompt, its rows run in the same forward, behind the selected ones: that is the
    same mathematics as recomputing and then prefilling, and reads the weights once.

    Args:
        model: A patched model.
        cache: A stitched cache in the global geometry that ends with its context.
        slots: Slots to recompute, in any order, each once.
        prompt_ids: Tokens to be answered; their rows are appended to the cache.
        block_tokens: Run at most this many rows at once, in ascending blocks. Only the memory
            needed changes.
        depths: For each slot, in the order given, the number of layers from the first in which it
            is recomputed. Deeper layers keep its keys and values and do not run it, so the sets of
            the layers are nested. All layers if None. The prompt's rows run through all layers.

    Returns:
        Logits of the prompt's last row, ``[vocabulary]``, or None without a prompt.

    Raises:
        NotPatchedError: The model is not patched.
        InvalidInputError: Slots out of range or duplicated, depths that are not one per slot from
            0 to the number of layers, bad ids, rows appended already, or more tokens than the
            model has positions.
        GeometryError: The cache's geometry is not global.
        FingerprintMismatchError: The cache belongs to another model.
    """
    job = Recomputation.checked(model, cache, slots, prompt_ids, depths)
    return run_recomputations(model, [job], block_tokens)[0]


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
        caches: For each request a separate cache.
        slots: For each request the slots to recompute.
        prompts: For each request the tokens to be answered, or None; None if there are none.
        block_tokens: Run at most this many rows at once, over all requests. Only the memory
            needed changes.

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


@torch.no_grad()
def run_recomputations(
    model: PreTrainedModel, jobs: Sequence[Recomputation], block_tokens: int | None
) -> list[Tensor | None]:
    """Run the rows of one or several requests together; see `recompute`.

    Args:
        model: A patched model.
        jobs: The requests, each over a separate cache.
        block_tokens: Rows to run at once; None runs all.

    Returns:
        For each request what `recompute` returns.

    Raises:
        InvalidInputError: ``block_tokens`` is no whole number of at least 1.
    """
    if block_tokens is not None:
        check_positive(block_tokens, "block_tokens")
    handle = handle_of(model)
    for job in jobs:
        if len(job.slots):
            for layer in job.cache.layers:
                layer.reserve(job.length)
    counts = [len(job.slots) for job in jobs]
    lasts: dict[int, Tensor] = {}
    for block in cut_blocks(counts, block_tokens or max(1, sum(counts))):
        hidden = _run_block(model, handle, [(jobs[index], rows) for index, rows in block])
        end = 0
        for index, rows in block:
            end += rows.stop - rows.start
            if rows.stop == counts[index] and jobs[index].prompt is not None:
                lasts[index] = hidden[:, end - 1 : end].clone()  # a view would keep all rows
    for job in jobs:
        if job.pending is not None:
            job.pending.mark_done()
    logits: list[Tensor | None] = [None] * len(jobs)
    if not lasts:
        return logits
    answering = sorted(lasts)
    rows_of = torch.cat([lasts[index] for index in answering], dim=1)
    found = _answer_rows(model, handle, [jobs[index] for index in answering], rows_of)
    for index, row in zip(answering, found, strict=True):
        job = jobs[index]
        logits[index] = row
        for layer in job.cache.layers:
            layer.length = job.length
        job.cache.prompt_ids = job.prompt
    return logits


def cut_blocks(counts: Sequence[int], size: int) -> Iterator[list[tuple[int, slice]]]:
    """Cut the rows of several requests, laid end to end, into blocks of ``size`` rows at most.

    Args:
        counts: Rows of each request.
        size: At least 1.

    Yields:
        For each block its requests' numbers and which of their rows are in it.

    >>> list(cut_blocks([3, 0, 2], 4))
    [[(0, slice(0, 3, None)), (2, slice(0, 1, None))], [(2, slice(1, 2, None))]]
    """
    block: list[tuple[int, slice]] = []
    room = size
    for index, count in enumerate(counts):
        start = 0
        while start < count:
            stop = min(count, start + room)
            block.append((index, slice(start, stop)))
            room -= stop - start
            start = stop
            if room == 0:
                yield block
                block, room = [], size
    if block:
        yield block


def _run_block(
    model: PreTrainedModel, handle: PatchHandle, block: Sequence[tuple[Recomputation, slice]]
) -> Tensor:
    """Run rows through the layers, up to the last layer's keys and values.

    Returns:
        The last layer's input, ``[1, rows, hidden]``.
    """
    hidden = torch.cat([job.entering(model, rows) for job, rows in block], dim=1)
    pictures = side_by_side(
        [(job.cache.pictures_at(job.slots[rows]), rows.stop - rows.start) for job, rows in block]
    )
    own = [job.slots[rows] for job, rows in block]
    lengths = [job.length for job, _ in block]
    if any(job.depths is not None or job.begins is not None for job, _ in block):
        depth = DecoderView(model).num_layers
        reach, begins = [], []
        for part, (job, rows) in zip(own, block, strict=True):
            reach.append(torch.full_like(part, depth) if job.depths is None else job.depths[rows])
            begins.append(torch.zeros_like(part) if job.begins is None else job.begins[rows])
        caches = [job.cache for job, _ in block]
        return run_by_depth(model, handle, caches, hidden, own, lengths, reach, begins, pictures)
    plan = handle.backend.plan_requests(own, lengths, model.device)
    last = DecoderView(model).num_layers - 1
    counts = [rows.stop - rows.start for _, rows in block]
    caches = [job.cache for job, _ in block]
    run = RowsPass(handle, caches, counts, plan, skip_attention_in=last)
    positions = run.positions
    rotation = handle.rope.rotation(positions, hidden.dtype)
    # Only the last layer's keys and values are needed at these rows, not its output.
    graphs = handle.captures
    return run_to_attention(model, graphs, hidden, positions, rotation, run, last, pictures)


def _answer_rows(
    model: PreTrainedModel, handle: PatchHandle, jobs: Sequence[Recomputation], hidden: Tensor
) -> Tensor:
    """Run the last layer for each request's last row, whose keys and values have been written.

    Args:
        model: A patched model.
        handle: Its handle.
        jobs: The requests.
        hidden: The last layer's input at these rows, ``[1, requests, hidden]``.

    Returns:
        Logits ``[requests, vocabulary]``.
    """
    last = DecoderView(model).num_layers - 1
    plan = handle.backend.plan_requests(
        [job.slots[-1:] for job in jobs], [job.length for job in jobs], model.device
    )
    caches, counts = [job.cache for job in jobs], [1] * len(jobs)
    run = RowsPass(handle, caches, counts, plan, write=False)
    positions = run.positions
    rotation = handle.rope.rotation(positions, hidden.dtype)
    out = run_layers(model, hidden, positions, rotation, run, last + 1, start=last)
    return row_logits(model, out)
