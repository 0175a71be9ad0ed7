"""Recompute with a dense mask over the stitched cache, the obvious implementation.

The unpatched model's own forward runs the selected rows and the prompt behind them. It is given
their positions, a cache that overwrites the rows' slots and returns all slots, and a mask
``[rows, slots]`` that hides the slots ahead of each row. The library's recompute is measured
against it, so it has no avoidable cost. The mask is built once, additive and in the model's dtype;
SDPA would convert a boolean one in every layer. Rows are written in place, and logits are computed
for the last row only. Its inherent costs remain: masked blocks are computed, and with a mask
transformers repeats keys and values for every query head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from ifkv.cache.stitched import StitchedCache
from ifkv.models.compat import cache_keyword


class OverwritingCache(DynamicCache):
    """Cache whose rows at given slots are overwritten layer by layer.

    Args:
        stitched: Cache to start from; it is copied.
        slots: Long ``[k]``, ascending: the rows to recompute.
        prompt_length: Number of rows behind the context.
    """

    def __init__(self, stitched: StitchedCache, slots: Tensor, prompt_length: int):
        super().__init__()
        self.length = stitched.context_length + prompt_length
        behind = torch.arange(stitched.context_length, self.length)
        self.slots = torch.cat((slots.cpu(), behind)).to(stitched.token_ids.device)
        self.rows: list[tuple[Tensor, Tensor]] = []
        for layer in stitched.layers:
            room = (0, 0, 0, prompt_length)
            pair = (torch.nn.functional.pad(rows, room) for rows in (layer.keys, layer.values))
            self.rows.append(tuple(pair))

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Write the rows and return everything, ``[1, kv_heads, slots, head_dim]``."""
        keys, values = self.rows[layer_idx]
        keys.index_copy_(2, self.slots, key_states)
        values.index_copy_(2, self.slots, value_states)
        return keys, values

    def get_seq_length(self, layer_idx=0):
        """Return 0: positions and mask are given, and must not be derived from a length."""
        return 0


@torch.no_grad()
def recompute_densely(model, cache: OverwritingCache, context_ids: Tensor, prompt) -> Tensor:
    """Recompute the cache's slots and prefill the prompt in one forward.

    Args:
        model: The model, not patched, with SDPA attention.
        cache: Cache to recompute in place.
        context_ids: Long ``[T]``, the stitched context's tokens.
        prompt: The prompt's token ids.

    Returns:
        Logits of the prompt's last row, ``[vocabulary]``.
    """
    slots, dtype = cache.slots, cache.rows[0][0].dtype
    ahead = torch.arange(cache.length, device=slots.device) > slots[:, None]
    mask = torch.zeros(ahead.shape, dtype=dtype, device=slots.device)
    mask.masked_fill_(ahead, float("-inf"))
    ids = torch.cat((context_ids, torch.as_tensor(prompt, device=context_ids.device)))[slots]
    out = model(
        ids[None],
        attention_mask=mask[None, None],
        position_ids=slots[None],
        **cache_keyword(model, cache),
        logits_to_keep=1,
    )
    return out.logits[0, -1]
