"""Interface of a stitched cache to transformers, beyond appending rows.

Between 5.4 and 5.24 ``Cache`` has some thirty methods and properties. Those that make sense for
documents side by side work. The others are refused with a reason: transformers' own methods would
zero the documents' rows, or fail somewhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from ifkv.errors import InvalidInputError
from ifkv.utils.checks import check_positive

RESET = (
    "its documents' rows are what it is for. Call crop() to drop what was appended behind them, or "
    "stitch the documents again."
)
MOVED = "its rows stay on the model's device; move nothing, and let the cache go when it is done."
ASSISTED = (
    "assisted decoding, which begins with it, runs the whole context again behind a cache that "
    "holds it already. Leave the assistant out, or call ifkv.generate, which refuses it first."
)
LINEAR = "it keeps keys and values, and none of its layers has a state of linear attention."


def refusing(name: str, why: str) -> Callable[..., NoReturn]:
    """Make a method that raises InvalidInputError for any arguments.

    Args:
        name: Its name.
        why: The reason, which the message ends with.
    """

    def refuse(self: object, *args: object, **kwargs: object) -> NoReturn:
        raise InvalidInputError(f"{name}() is not for a stitched cache: {why}")

    refuse.__name__ = name
    refuse.__doc__ = f"Refuse: {why}"
    return refuse


class CacheInterface(Cache):
    """Methods of transformers' caches that a stitched cache overrides or refuses."""

    layers: list[Any]

    prefetch = refusing("prefetch", MOVED)
    activate_past_recording = refusing("activate_past_recording", ASSISTED)
    get_conv_state = refusing("get_conv_state", LINEAR)
    update_conv_state = refusing("update_conv_state", LINEAR)
    get_recurrent_state = refusing("get_recurrent_state", LINEAR)
    update_recurrent_state = refusing("update_recurrent_state", LINEAR)
    update_indexer = refusing("update_indexer", LINEAR)
    has_previous_state = refusing("has_previous_state", LINEAR)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a layer's rows.

        Args:
            key_states: ``[batch, kv_heads, rows, head_dim]``.
            value_states: Of the same shape.
            layer_idx: The layer.
            *args: Further arguments of some releases of transformers; not used.
            **kwargs: As args.

        Returns:
            The layer's keys and values, ``[batch, kv_heads, length, head_dim]``.

        Raises:
            InvalidInputError: There is no such layer, or its rows have another shape.
            GeometryError: The cache can only be scored, or is full.
        """
        if not 0 <= layer_idx < len(self.layers):
            raise InvalidInputError(
                f"rows of layer {layer_idx} were given to a cache of {len(self.layers)} layers; "
                "stitch documents that this model made, with the layers it has now."
            )
        rows: tuple[Tensor, Tensor] = self.layers[layer_idx].update(key_states, value_states)
        return rows

    @property
    def batch_size(self) -> int:
        """Return the number of sequences: 1, until `batch_repeat_interleave`."""
        return int(self.layers[0].batch_size)

    @property
    def max_batch_size(self) -> int:
        """Return `batch_size` under the name that releases before 5.13 use."""
        return self.batch_size

    @property
    def max_cache_len(self) -> int:
        """Return -1: the cache grows with the rows that are appended."""
        return -1

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every sequence several times, for ``model(...)`` and ``model.generate(...)``.

        ifkv's own functions take one sequence; for them, stitch a cache for each request.

        Raises:
            InvalidInputError: It is no positive whole number.
        """
        check_positive(repeats, "repeats")
        for layer in self.layers:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences.

        Args:
            indices: Long ``[n]``, or a mask ``[batch]``.

        Raises:
            InvalidInputError: There are no such sequences, or none is chosen.
        """
        chosen = self._chosen(indices, "batch_select_indices")
        for layer in self.layers:
            layer.batch_select_indices(chosen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put sequences in another order, as beam search does.

        Args:
            beam_idx: Long ``[n]``.

        Raises:
            InvalidInputError: There are no such sequences, or none is chosen.
        """
        chosen = self._chosen(beam_idx, "reorder_cache")
        for layer in self.layers:
            layer.reorder_cache(chosen)

    def _chosen(self, indices: Tensor, what: str) -> Tensor:
        found = torch.as_tensor(indices)
        batch = self.batch_size
        if found.dtype == torch.bool and found.shape == (batch,):
            found = found.nonzero()[:, 0]
        whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
        fits = whole and found.ndim == 1 and len(found) > 0
        # On a GPU the check would wait for the device at every step of a beam search.
        if fits and found.device.type == "cpu":
            fits = bool((found >= -batch).all() and (found < batch).all())
        if not fits:
            raise InvalidInputError(
                f"{what}({indices!r}) does not choose from the cache's {batch} sequences; give at "
                f"least one whole number below {batch}."
            )
        return found


def check_single(cache: CacheInterface) -> None:
    """Refuse a cache that holds several sequences.

    Args:
        cache: A cache.

    Raises:
        InvalidInputError: It holds more than one.
    """
    if cache.batch_size != 1:
        raise InvalidInputError(
            f"this cache holds {cache.batch_size} sequences (batch_repeat_interleave), but ifkv's "
            "own functions take one. Stitch a cache for each request, or clone() it before."
        )
