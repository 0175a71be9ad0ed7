"""One request of a recompute: its rows, checked before any of them runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ifkv.cache.checks import check_answerable, check_cache
from ifkv.cache.stitched import StitchedCache
from ifkv.errors import InvalidInputError
from ifkv.forward.layers import embed
from ifkv.steps.partial_depth import checked_depths
from ifkv.utils.checks import token_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.pending import PendingTokens


@dataclasses.dataclass(frozen=True, eq=False)
class Recomputation:
    """Rows of one request, checked and ready to run.

    Attributes:
        cache: Its cache.
        slots: Long ``[rows]``, ascending, on the CPU: slots selected or pending, then the
            prompt's.
        token_ids: Long ``[rows]``, on the model's device.
        prompt: The prompt's tokens, on the model's device, or None.
        length: Slots in use once the rows have run.
        depths: Long ``[rows]``, on the CPU: the number of layers of each row; None runs all.
        pending: The cache's pending tokens, which are among the slots and may begin in a later
            layer; None if there are none.
    """

    cache: StitchedCache
    slots: Tensor
    token_ids: Tensor
    prompt: Tensor | None
    length: int
    depths: Tensor | None = None
    pending: PendingTokens | None = None

    @classmethod
    def checked(
        cls,
        model: PreTrainedModel,
        cache: StitchedCache,
        slots: Sequence[int] | Tensor,
        prompt_ids: Sequence[int] | Tensor | None,
        depths: Sequence[int] | Tensor | None = None,
    ) -> Recomputation:
        """Check the arguments of `recompute`; raises its errors, and changes nothing."""
        handle = check_cache(model, cache)
        check_answerable(cache, "recompute")
        handle.rope.check_frequencies()
        rows = _checked_slots(slots, cache.context_length)
        layers = len(cache.layers)
        reach = None if depths is None else checked_depths(depths, slots, layers)
        pending = cache.pending
        if pending is not None and not len(pending.slots):
            pending = None
        if pending is not None:  # they run through all layers, selected or not
            other = ~torch.isin(rows, pending.slots)
            rows, order = torch.cat((rows[other], pending.slots)).sort()
            if reach is not None:
                reach = torch.cat((reach[other], torch.full_like(pending.slots, layers)))[order]
        ids = cache.token_ids[rows.to(cache.token_ids.device)]
        length = cache.context_length
        prompt = None
        if prompt_ids is not None:
            prompt = token_tensor(model, prompt_ids, "the prompt").to(model.device)
            length += len(prompt)
            handle.rope.check_length(cache.query_position + len(prompt), "context and prompt")
            rows = torch.cat((rows, torch.arange(cache.context_length, length)))
            ids = torch.cat((ids, prompt))
            if reach is not None:
                reach = torch.cat((reach, reach.new_full((len(prompt),), layers)))
        return cls(cache, rows, ids, prompt, length, reach, pending)

    @property
    def begins(self) -> Tensor | None:
        """Return each row's first layer, long ``[rows]``, on the CPU; None if that is 0 for all."""
        if self.pending is None or self.pending.layer == 0:
            return None
        return torch.isin(self.slots, self.pending.slots) * self.pending.layer

    def entering(self, model: PreTrainedModel, rows: slice) -> Tensor:
        """Return the input of each row's first layer, ``[1, rows, hidden]``.

        At rows of pictures it is that of their placeholders, which `run_layers` replaces.
        """
        hidden = embed(model, self.token_ids[rows])
        if self.pending is not None and self.pending.layer > 0:
            at, own = self.slots[rows], self.pending.slots
            hidden[:, torch.isin(at, own)] = self.pending.hidden[:, torch.isin(own, at)]
        return hidden


def _checked_slots(slots: Sequence[int] | Tensor, length: int) -> Tensor:
    """Check slots and return them as an ascending long tensor on the CPU."""
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
