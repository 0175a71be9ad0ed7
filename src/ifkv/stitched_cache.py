"""The cache of one request: stitched documents, and whatever is appended behind them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ifkv.errors import FingerprintMismatchError, GeometryError, InvalidInputError
from ifkv.marks import mark_stitched
from ifkv.patching import PatchHandle, handle_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from ifkv.layer_loading import LayerLoader
    from ifkv.positions import Layout

# Slots kept free behind the context for prompt and answer, and what capacity is rounded up to.
HEADROOM = 256
PAGE = 64


def capacity_for(length: int) -> int:
    """Slots to allocate for a context: headroom for prompt and answer, rounded up to pages."""
    return -(-(length + HEADROOM) // PAGE) * PAGE


class StitchedLayer(DynamicLayer):
    """One layer's keys and values, with room to append in place.

    Attributes:
        keys: ``[1, kv_heads, length, head_dim]``, after the rotation; a view of :attr:`key_buffer`.
        values: As keys.
        settle: Fills the buffers, where they are being loaded; called before their first use.
        shared: Whether caches of other requests lie in the buffers' allocation.
    """

    def __init__(self, key_buffer: Tensor, value_buffer: Tensor, length: int, refusal: str = ""):
        self._key_buffer = key_buffer
        self._value_buffer = value_buffer
        self.settle: Callable[[], None] | None = None
        self.shared = False
        self.length = length
        self.limit: int | None = None
        self._refusal = refusal
        cast(Any, super()).__init__()
        self.dtype, self.device = key_buffer.dtype, key_buffer.device
        self.is_initialized = True

    @property
    def key_buffer(self) -> Tensor:
        """Keys with the room behind them, ``[1, kv_heads, capacity, head_dim]``."""
        self._settled()
        return self._key_buffer

    @key_buffer.setter
    def key_buffer(self, buffer: Tensor) -> None:
        self._settled()
        self._key_buffer = buffer

    @property
    def value_buffer(self) -> Tensor:
        """As :attr:`key_buffer`."""
        self._settled()
        return self._value_buffer

    @value_buffer.setter
    def value_buffer(self, buffer: Tensor) -> None:
        self._settled()
        self._value_buffer = buffer

    def _settled(self) -> None:
        settle = self.settle  # looked at once: another thread may be done with it meanwhile
        if settle is not None:
            settle()
            self.settle = None

    def __getstate__(self) -> dict[str, Any]:
        self._settled()  # copies, as pickles, are of rows that are there
        state = self.__dict__.copy()
        if self.shared:  # and take nothing of other requests along
            state["_key_buffer"] = self._key_buffer.clone()
            state["_value_buffer"] = self._value_buffer.clone()
            state["shared"] = False
        return state

    @property
    def keys(self) -> Tensor:
        """The keys in use."""
        return self.key_buffer[:, :, : self.length]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        # transformers assigns whole tensors (beams, offloading); its constructor assigns None.
        if keys is not None:
            self.key_buffer, self.length = keys, keys.shape[2]

    @property
    def values(self) -> Tensor:
        """The values in use."""
        return self.value_buffer[:, :, : self.length]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        if values is not None:
            self.value_buffer, self.length = values, values.shape[2]

    def reserve(self, length: int) -> None:
        """Make room for ``length`` slots; buffers that have it already stay where they are."""
        capacity = self._key_buffer.shape[2]  # known before the rows are there
        if length <= capacity:
            return
        capacity = -(-max(length, capacity + capacity // 2) // PAGE) * PAGE
        for name in ("key_buffer", "value_buffer"):
            old: Tensor = getattr(self, name)
            batch, kv_heads, _, head_dim = old.shape
            new = old.new_empty(batch, kv_heads, capacity, head_dim)
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write rows at slots within the buffers; :attr:`length` stays as it is.

        Args:
            slots: Long ``[rows]``.
            keys: ``[1, kv_heads, rows, head_dim]``.
            values: Of the same shape.
        """
        self.key_buffer.index_copy_(2, slots, keys)
        self.value_buffer.index_copy_(2, slots, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append rows, as transformers asks of a cache layer."""
        if self._refusal:
            raise GeometryError(self._refusal)
        end = self.length + key_states.shape[2]
        if self.limit is not None and end > self.limit:
            raise GeometryError(
                f"the answer reaches position {end - 1}, but longrope changes its frequencies at "
                f"{self.limit}; stop before (max_new_tokens) or use fewer documents."
            )
        self.reserve(end)
        self.key_buffer[:, :, self.length : end] = key_states
        self.value_buffer[:, :, self.length : end] = value_states
        self.length = end
        return mark_stitched(self.keys), self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Drop that many rows (given as a negative number) from the end."""
        self.length -= abs(tokens_to_remove)

    def clone(self) -> StitchedLayer:
        """A layer of its own with the same contents."""
        twin = StitchedLayer(
            self.key_buffer.clone(), self.value_buffer.clone(), self.length, self._refusal
        )
        twin.limit = self.limit
        return twin


class StitchedCache(Cache):
    """The cache of one request: prefix and documents side by side, then whatever is appended.

    A transformers ``Cache``: it works in ``model(...)`` and ``model.generate(...)``. It is private
    to its request; the documents it was stitched from are never written.

    Attributes:
        token_ids: Long ``[T]``, the context's tokens, on the model's device.
        positions: Long ``[T]``, their RoPE positions.
        document_slices: Slots of each document, in the cache's order.
        prefix_length: Slots of the prefix, which come first.
        query_position: Position of the first token behind the context.
        geometry: ``"global"``, ``"hl-hp"``, ``"tl-tp"`` or ``"hl-tp"``.
        order: For each document of the cache, its index among the documents given.
        fingerprint: Identity of the model that it belongs to.
        prompt_ids: Tokens whose rows a fused :func:`ifkv.recompute` has appended, or None.
        layers: One :class:`StitchedLayer` per decoder layer.
        loader: What reads the documents, if a store does so lazily; None otherwise.
    """

    loader: LayerLoader | None = None
    layers: list[StitchedLayer]  # type: ignore[assignment]  # of one kind, unlike the base's

    def __init__(
        self,
        layers: list[StitchedLayer],
        token_ids: Tensor,
        placed: Layout,
        order: list[int],
        fingerprint: str,
    ):
        super().__init__(layers=cast(list[Any], layers))
        self.token_ids = token_ids
        self.positions = placed.positions.to(token_ids.device)
        self.document_slices = placed.document_slices
        self.prefix_length = placed.prefix_length
        self.query_position = placed.query_position
        self.geometry = placed.geometry
        self.order = order
        self.fingerprint = fingerprint
        self.prompt_ids: Tensor | None = None

    @property
    def context_length(self) -> int:
        """Slots of prefix and documents, T."""
        return len(self.token_ids)

    def crop(self, tokens_to_remove: int | None = None) -> None:
        """Drop what was appended behind the context.

        Args:
            tokens_to_remove: How many slots to drop, as a negative number, as transformers has
                it; all that follow the context if None.

        Raises:
            InvalidInputError: It is positive, or would cut into the context.
        """
        appended = self.get_seq_length() - self.context_length
        if tokens_to_remove is None:
            tokens_to_remove = -appended
        if tokens_to_remove > 0 or -tokens_to_remove > appended:
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
        """A cache of its own with the same contents."""
        twin = copy.copy(self)
        twin.layers = [layer.clone() for layer in self.layers]
        return twin

    def __getstate__(self) -> dict[str, Any]:
        for layer in self.layers:  # all first: their buffers share one storage
            layer._settled()
        return self.__dict__ | {"loader": None}

    def __repr__(self) -> str:
        appended = self.get_seq_length() - self.context_length
        return (
            f"StitchedCache({len(self.document_slices)} documents, {self.context_length} slots "
            f"+ {appended}, {self.geometry}, {self.fingerprint[:8]})"
        )


def check_stitched(cache: object) -> None:
    """Refuse what is no stitched cache.

    Raises:
        InvalidInputError: It is something else.
    """
    if not isinstance(cache, StitchedCache):
        raise InvalidInputError(
            f"a {type(cache).__name__} was given as cache; make one with ifkv.stitch."
        )


def check_cache(model: PreTrainedModel, cache: StitchedCache) -> PatchHandle:
    """Refuse a cache that does not belong to the model.

    Returns:
        The model's handle.

    Raises:
        NotPatchedError: The model is not patched.
        InvalidInputError: It is no stitched cache.
        FingerprintMismatchError: It belongs to another model.
    """
    handle = handle_of(model)
    check_stitched(cache)
    identity = handle.fingerprints.of(model, glance=False)  # stitch has done so
    if cache.fingerprint != identity:
        raise FingerprintMismatchError(
            f"the cache belongs to model {cache.fingerprint[:8]}, this one is {identity[:8]}. "
            "Stitch documents that this model made."
        )
    return handle


def check_answerable(cache: StitchedCache, what: str) -> None:
    """Refuse a cache that can only be scored, or that holds more than its context.

    Raises:
        GeometryError: The geometry is not global.
        InvalidInputError: Rows have been appended behind the context.
    """
    if cache.geometry != "global":
        raise GeometryError(
            f"{what} needs the geometry 'global', the cache has {cache.geometry!r}, which can only "
            "be scored. Stitch the documents again."
        )
    appended = cache.get_seq_length() - cache.context_length
    if appended:
        raise InvalidInputError(
            f"{what} needs a cache that ends with its context, but {appended} slots have been "
            "appended. Call cache.crop() first."
        )
