"""Recompute selected slots under the full causal mask, in one forward with the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ifkv.backends.base import RowPlan
from ifkv.checks import check_positive, token_tensor
from ifkv.errors import InvalidInputError
from ifkv.forward import embed, last_logits, num_layers, run_attention, run_layers
from ifkv.patching import PatchHandle
from ifkv.stitched_cache import StitchedCache, check_answerable, check_cache

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
        block_tokens: Run at most this many rows at once, in ascending blocks, which changes
            nothing but the memory needed.

    Returns:
        Logits of the prompt's last row, ``[vocabulary]``, or None without a prompt.

    Raises:
        NotPatchedError: The model is not patched.
        InvalidInputError: Slots out of range or duplicated, bad ids, rows appended already, or
            more tokens than the model has positions.
        GeometryError: The cache's geometry is not global.
        FingerprintMismatchError: The cache belongs to another model.
    """
    handle = check_cache(model, cache)
    check_answerable(cache, "recompute")
    handle.rope.check_frequencies()
    rows = _checked_slots(slots, cache.context_length)
    ids = cache.token_ids[rows.to(cache.token_ids.device)]
    length = cache.context_length
    prompt = None
    if prompt_ids is not None:
        prompt = token_tensor(model, prompt_ids, "the prompt").to(model.device)
        length += len(prompt)
        handle.rope.check_length(length, "context and prompt")
        rows = torch.cat((rows, torch.arange(cache.context_length, length)))
        ids = torch.cat((ids, prompt))
    if block_tokens is not None:
        check_positive(block_tokens, "block_tokens")
    if len(rows) == 0:
        return None

    for layer in cache.layers:
        layer.reserve(length)
    step = block_tokens or len(rows)
    hidden = None
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        hidden = _run_block(model, handle, cache, rows[block], ids[block], length)
    if prompt is None or hidden is None:
        return None
    logits = _answer_row(model, handle, cache, hidden, length)
    for layer in cache.layers:
        layer.length = length
    cache.prompt_ids = prompt
    return logits


def _checked_slots(slots: Sequence[int] | Tensor, length: int) -> Tensor:
    """Slots as an ascending long tensor on the CPU."""
    try:
        given = torch.as_tensor(slots).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"slots is no sequence of whole numbers: {error}.") from error
    if given.ndim != 1 or (
        len(given) and (given.dtype.is_floating_point or given.dtype == torch.bool)
    ):
        raise InvalidInputError(
            f"slots are {given.dtype} of shape {tuple(given.shape)}; integers [k] are wanted, as "
            "ifkv.select returns them."
        )
    ordered = given.to(torch.long).sort().values
    if len(ordered) and not 0 <= int(ordered[0]) <= int(ordered[-1]) < length:
        bad = int(ordered[0]) if ordered[0] < 0 else int(ordered[-1])
        raise InvalidInputError(
            f"slot {bad} is out of range: the context has slots 0 to {length - 1}."
        )
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise InvalidInputError(
            f"slot {int(twice[0])} is given more than once; name each slot once."
        )
    return ordered


def _run_block(
    model: PreTrainedModel,
    handle: PatchHandle,
    cache: StitchedCache,
    slots: Tensor,
    token_ids: Tensor,
    length: int,
) -> Tensor:
    """Run rows through the layers, up to the last layer's keys and values.

    Returns:
        What the last layer was given, ``[1, rows, hidden]``.
    """
    plan = handle.backend.plan_rows(slots, length, model.device)
    hidden = embed(model, token_ids)
    cos, sin = handle.rope.cos_sin(plan.slots, hidden.dtype)
    last = num_layers(model) - 1
    run = RowsPass(handle, cache, plan, skip_attention_in=last)
    rotation = (cos[None], sin[None])
    hidden = run_layers(model, hidden, plan.slots, rotation, run, last)
    # Nobody reads the last layer's output at these rows, only its keys and values.
    run_attention(model, hidden, plan.slots, rotation, run, last)
    return hidden


def _answer_row(
    model: PreTrainedModel, handle: PatchHandle, cache: StitchedCache, hidden: Tensor, length: int
) -> Tensor:
    """The last layer for the last row alone, whose keys and values have been written."""
    last = num_layers(model) - 1
    plan = handle.backend.plan_rows(torch.tensor([length - 1]), length, model.device)
    cos, sin = handle.rope.cos_sin(plan.slots, hidden.dtype)
    run = RowsPass(handle, cache, plan, write=False)
    rotation = (cos[None], sin[None])
    out = run_layers(model, hidden[:, -1:], plan.slots, rotation, run, last + 1, start=last)
    return last_logits(model, out)


class RowsPass:
    """Rows scattered over a stitched cache: written at their slots, then position-causal."""

    def __init__(
        self,
        handle: PatchHandle,
        cache: StitchedCache,
        plan: RowPlan,
        *,
        write: bool = True,
        skip_attention_in: int | None = None,
    ):
        self._backend = handle.backend
        self._cache = cache
        self._plan = plan
        self._write = write
        self._skip = skip_attention_in

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Overwrite the rows' slots; the whole buffer is what they attend to."""
        layer = self._cache.layers[layer_idx]
        if self._write:
            layer.write(self._plan.slots, keys, values)
        return layer.key_buffer, layer.value_buffer

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        """Position-causal attention of the rows."""
        if layer_idx == self._skip:
            return query.transpose(1, 2)  # run for its keys and values; nobody reads this
        return self._backend.attend_rows(
            query, keys, values, self._plan, scaling=scaling, window=window
        )
