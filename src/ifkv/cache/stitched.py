"""The cache of one request: stitched documents, and the rows appended behind them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ifkv.cache.given_sequence import check_given
from ifkv.cache.interface import CacheInterface, check_single
from ifkv.cache.layer import StitchedLayer
from ifkv.errors import GeometryError, InvalidInputError
from ifkv.forward.picture_rows import side_by_side
from ifkv.models.rope import join_positions

if TYPE_CHECKING:
    from ifkv.cache.layout import Layout
    from ifkv.cache.loading import LayerLoader
    from ifkv.cache.pending import PendingTokens
    from ifkv.documents.images import ImageRows
    from ifkv.documents.surrogate import SurrogateContext
    from ifkv.forward.picture_rows import PictureRows


class StitchedCache(CacheInterface):
    """Cache of one request: prefix and documents side by side, then the rows appended to them.

    It is a transformers ``Cache`` and works in ``model(...)`` and ``model.generate(...)``. It is
    private to its request; the documents it was stitched from are never written. The context grows
    by appended rows (`keep`) and by documents ([ifkv.extend][]).

    Attributes:
        token_ids: Long ``[T]``, the context's tokens, on the model's device.
        positions: Long ``[T]``, their RoPE positions; ``[axes, T]`` where a model rotates by
            several axes.
        plain: Whether every slot is its own position, also of rows that will be appended.
        document_slices: Slots of each document, in the cache's order. Between them and behind them
            may be rows that were appended and kept.
        prefix_length: Slots of the prefix, which come first.
        query_position: Position of the first token behind the context.
        geometry: ``"global"``, ``"hl-hp"``, ``"tl-tp"`` or ``"hl-tp"``.
        order: The index of each document of the cache among the documents given.
        sensitivities: Of each document's tokens, as in `DocumentCache`; None if not measured.
        surrogates: The surrogate context that each document was encoded behind; None if none.
        images: Of each document's pictures, as in `DocumentCache`; None for a text.
        axes: Number of axes of a position in the cache's model.
        fingerprint: Identity of the cache's model.
        exact_length: Slots at the beginning that hold what a full prefill computes: the prefix,
            and the first document if it was encoded without a surrogate context.
        prompt_ids: Tokens whose rows a fused [ifkv.recompute][] has appended, or None.
        candidates: Slots that a selector may choose and that a ratio counts, long ``[c]``,
            ascending, on the model's device; see `choosing`. If None, a selector may choose all
            slots that are not exact already, and a ratio counts the whole context.
        pending: Tokens of the context that have not run through all layers yet, or None.
        layers: One `StitchedLayer` per decoder layer.
        loader: The loader of lazy documents; None if there are none.
    """

    loader: LayerLoader | None = None
    layers: list[StitchedLayer]

    def __init__(
        self,
        layers: list[StitchedLayer],
        token_ids: Tensor,
        placed: Layout,
        order: list[int],
        sensitivities: list[Tensor | None],
        surrogates: list[SurrogateContext | None],
        images: list[ImageRows | None],
        fingerprint: str,
        axes: int = 1,
    ):
        super().__init__(layers=cast(list[Any], layers))
        self.token_ids = token_ids
        self.positions = placed.positions.to(token_ids.device)
        self.document_slices = placed.document_slices
        self.prefix_length = placed.prefix_length
        self.query_position = placed.query_position
        self.plain = placed.plain
        self.geometry = placed.geometry
        self.order = order
        self.sensitivities = sensitivities
        self.surrogates = surrogates
        self.images = images
        self.axes = axes
        self.fingerprint = fingerprint
        first = placed.document_slices[0]
        self.exact_length: int = first.stop if surrogates[0] is None else first.start
        self.prompt_ids: Tensor | None = None
        self.candidates: Tensor | None = None
        self.pending: PendingTokens | None = None

    @property
    def context_length(self) -> int:
        """Return T, the slots of the context: prefix, documents, and rows that were kept."""
        return len(self.token_ids)

    @property
    def budget_length(self) -> int:
        """Return the number of slots that a recompute ratio is a share of."""
        return self.context_length if self.candidates is None else len(self.candidates)

    @property
    def first_candidate(self) -> int:
        """Return the lowest slot that a selector may choose."""
        if self.candidates is None:
            return self.exact_length
        return int(self.candidates[0]) if len(self.candidates) else self.context_length

    @property
    def candidate_slots(self) -> Tensor:
        """Return the slots that a selector may choose, long, ascending."""
        if self.candidates is not None:
            return self.candidates
        return torch.arange(self.exact_length, self.context_length, device=self.token_ids.device)

    @property
    def stale_slices(self) -> list[slice]:
        """Return the slots of each document that is not exact already."""
        return [rows for rows in self.document_slices if rows.start >= self.exact_length]

    def positions_at(self, slots: Tensor) -> Tensor:
        """Return the positions of slots, of the context or behind it.

        Args:
            slots: Long ``[n]``, on the model's device.

        Returns:
            Long ``[n]``, or ``[axes, n]``.
        """
        if self.plain:
            return slots
        last = max(0, self.context_length - 1)
        behind = slots - self.context_length + self.query_position
        within = self.positions[..., slots.clamp(max=last)]
        return torch.where(slots < self.context_length, within, behind)

    def positions_with(self, behind: int) -> Tensor:
        """Return the positions of the context and of ``behind`` rows after it.

        Returns:
            Long ``[1, T + behind]``, as ``model.generate()`` takes them; with several axes ``[1 +
            axes, 1, T + behind]``, the slots first.
        """
        slots = torch.arange(self.context_length + behind, device=self.token_ids.device)
        positions = self.positions_at(slots)
        if self.axes == 1:
            return positions[..., None, :]
        return torch.cat((slots[None], positions.expand(self.axes, -1)))[:, None]

    def pictures_at(self, slots: Tensor) -> PictureRows | None:
        """Return the rows of pictures among slots of the context; None if there are none.

        Args:
            slots: Long ``[k]``, ascending, on the CPU; slots behind the context hold text.
        """
        found = []
        for rows, images in zip(self.document_slices, self.images, strict=True):
            if images is None:
                continue
            at = torch.isin(slots, images.at + rows.start).nonzero()[:, 0]
            if len(at):
                tokens = slots[at] - rows.start
                found.append((images.rows_at(tokens, at, self.token_ids.device), 0))
        return side_by_side(found)

    @property
    def appended(self) -> int:
        """Return the number of rows that were appended behind the context."""
        return self.layers[0].length - self.context_length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the slots in use: the context's and those appended.

        Args:
            layer_idx: The layer's number.

        Raises:
            InvalidInputError: ``model.generate()`` asks for tokens that do not continue the cache.
        """
        rows = int(super().get_seq_length(layer_idx))
        if not torch.compiler.is_compiling():  # generate() itself is never compiled
            check_given(self, sys._getframe(1), rows)
        return rows

    def choosing(self, candidates: Tensor) -> StitchedCache:
        """Return a view of this cache for a selector: the same rows, other slots to choose from.

        Args:
            candidates: As the attribute of this name.
        """
        view = copy.copy(self)
        view.candidates = candidates
        return view

    def keep(self, token_ids: Sequence[int] | Tensor) -> None:
        """Make the rows appended behind the context part of it, unchanged.

        A prompt and the answer of [ifkv.generate][], without its last token, which was never run,
        become the past of the next prompt.

        Args:
            token_ids: The tokens of the appended rows.

        Raises:
            InvalidInputError: There is not one token for each appended row, or the cache holds
                several sequences.
            GeometryError: The cache's geometry is not global.
        """
        check_single(self)
        if self.geometry != "global":
            raise GeometryError(
                f"keep() needs the geometry 'global', the cache has {self.geometry!r}, which can "
                "only be scored. Stitch the documents again."
            )
        if len(token_ids) != self.appended:
            raise InvalidInputError(
                f"{len(token_ids)} tokens were given for the {self.appended} rows behind the "
                "context; give one for each."
            )
        self.lengthen(torch.as_tensor(token_ids))

    def add_tokens(self, token_ids: Sequence[int]) -> Tensor:
        """Append tokens to the context whose rows are not there yet.

        Args:
            token_ids: The tokens.

        Returns:
            Their slots, long ``[n]``, on the CPU. Recompute them before anything reads them.
        """
        start = self.context_length
        self.lengthen(torch.as_tensor(token_ids))
        for layer in self.layers:
            layer.reserve(self.context_length)
            layer.length = self.context_length
        return torch.arange(start, self.context_length)

    def lengthen(
        self, token_ids: Tensor, offsets: Tensor | None = None, extent: int | None = None
    ) -> None:
        """Extend the context's tokens and positions; rows are not touched.

        Args:
            token_ids: The tokens, long ``[n]``.
            offsets: Their positions, counted from the first behind the context; consecutive if
                None.
            extent: Positions that they take; one each if None.
        """
        device, start = self.token_ids.device, self.query_position
        self.token_ids = torch.cat((self.token_ids, token_ids.to(device)))
        offsets = torch.arange(len(token_ids)) if offsets is None else offsets
        self.positions = join_positions((self.positions, offsets.to(device) + start))
        self.query_position = start + (len(token_ids) if extent is None else extent)
        self.prompt_ids = None

    @property
    def kv_dtype(self) -> torch.dtype | None:
        """Return the dtype that keys and values are rounded to; None if it is the model's dtype."""
        return self.layers[0].kv_dtype

    def crop(self, tokens_to_remove: int | None = None) -> None:
        """Drop rows that were appended behind the context.

        Args:
            tokens_to_remove: Number of slots to drop, negative as transformers has it; all that
                follow the context if None.

        Raises:
            InvalidInputError: The number is not whole, is positive, or would cut into the context.
        """
        appended = self.appended
        if tokens_to_remove is None:
            tokens_to_remove = -appended
        whole = isinstance(tokens_to_remove, int)
        if not whole or tokens_to_remove > 0 or -tokens_to_remove > appended:
            raise InvalidInputError(
                f"crop({tokens_to_remove}) is not possible: give a negative number of slots, at "
                f"most the {appended} that were appended behind the context."
            )
        kept = appended + tokens_to_remove
        for layer in self.layers:
            # A forward that failed half-way has not appended in every layer.
            layer.length = min(layer.length, self.context_length + kept)
        if self.prompt_ids is not None and kept != len(self.prompt_ids):
            self.prompt_ids = None

    def clone(self) -> StitchedCache:
        """Return a copy that shares no memory."""
        twin = copy.copy(self)
        twin.layers = [layer.clone() for layer in self.layers]
        twin.pending = copy.copy(self.pending)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        for layer in self.layers:  # all first: their buffers share one storage
            layer._settled()
        return self.__dict__ | {"loader": None}

    def __repr__(self) -> str:
        return (
            f"StitchedCache({len(self.document_slices)} documents, {self.context_length} slots "
            f"+ {self.appended}, {self.geometry}, {self.fingerprint[:8]})"
        )
