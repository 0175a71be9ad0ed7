"""Stitch documents' caches into one cache that a request owns."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ifkv.backends.fp8 import FLOAT8, check_kv_dtype
from ifkv.backends.plans import UNSCALED, KVScales
from ifkv.cache.fp8_layer import FP8Layer, place_rounded
from ifkv.cache.inputs import StitchPlan
from ifkv.cache.layer import StitchedLayer
from ifkv.cache.loading import LayerLoader
from ifkv.cache.stitched import StitchedCache
from ifkv.documents.cache import DocumentCache
from ifkv.errors import InvalidInputError
from ifkv.models.rope import place
from ifkv.patching.handle import handle_of
from ifkv.utils.checks import naming_request
from ifkv.utils.huge_pages import empty

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def stitch(
    model: PreTrainedModel,
    documents: Sequence[DocumentCache],
    *,
    order: Sequence[int] | None = None,
    geometry: str = "global",
    kv_dtype: torch.dtype | None = None,
) -> StitchedCache:
    """Stitch documents behind their prefix and rotate their keys to the geometry's positions.

    Keys are rotated once, from before the rotation, in the model's own arithmetic; values are
    copied. In the ``global`` geometry layer 0 equals a full prefill's, but for the rounding of
    projections that run over another number of rows. Background threads load lazy documents of a
    store layer by layer while the cache is in use; the first use of a layer waits for it.

    Args:
        model: A patched model.
        documents: Documents that this model made behind one prefix.
        order: The order to stitch them in, as indices; as given if None.
        geometry: ``"global"`` for a cache to recompute and answer from; ``"hl-hp"``, ``"tl-tp"``
            or ``"hl-tp"`` for one to be scored only.
        kv_dtype: Dtype of the cache's keys and values. ``torch.float8_e4m3fn`` takes a quarter of
            float32's memory and half of bfloat16's, and rounds (`ifkv.cache.fp8_layer`). The
            model's dtype if None.

    Returns:
        A cache that shares no memory with the documents.

    Raises:
        NotPatchedError: The model is not patched.
        InvalidInputError: No document, an order that is no permutation, prefixes that differ, an
            unknown geometry, more tokens than the model has positions, an unknown ``kv_dtype`` or
            one that the device cannot convert, or rows that it cannot hold.
        FingerprintMismatchError: A document was made by another model, dtype or rope
            configuration.
    """
    planned = StitchPlan.checked(model, documents, order, geometry, sample=False)
    check_kv_dtype(kv_dtype, model.device)
    return _stitch(model, [planned], kv_dtype)[0]


@torch.no_grad()
def stitch_many(
    model: PreTrainedModel,
    requests: Sequence[Sequence[DocumentCache]],
    *,
    orders: Sequence[Sequence[int] | None] | None = None,
    geometry: str = "global",
    kv_dtype: torch.dtype | None = None,
) -> list[StitchedCache]:
    """Stitch the documents of several requests; all is checked before anything is stitched.

    The caches are as private as those of [ifkv.stitch][], but lie side by side in one allocation,
    which a backend can read in one call. The allocation is freed with the last of them.

    Args:
        model: A patched model.
        requests: For each request its documents. Requests may share documents, which are held
            once, and may have different prefixes.
        orders: For each request its ``order``, as in [ifkv.stitch][].
        geometry: As in [ifkv.stitch][].
        kv_dtype: As in [ifkv.stitch][]; each request has separate scales.

    Returns:
        One cache per request.

    Raises:
        InvalidInputError: Not as many orders as requests, and as of [ifkv.stitch][]; the
            message names the request.
        FingerprintMismatchError: As of [ifkv.stitch][].
    """
    plans = _checked(model, requests, orders, geometry)
    check_kv_dtype(kv_dtype, model.device)
    return _stitch(model, plans, kv_dtype)


def _stitch(
    model: PreTrainedModel, plans: Sequence[StitchPlan], kv_dtype: torch.dtype | None
) -> list[StitchedCache]:
    """Stitch checked requests, side by side if their documents have one dtype and shape."""
    kinds = {(plan.first.dtype, plan.first.shape[:2], plan.first.shape[3:]) for plan in plans}
    if len(kinds) != 1 or len(plans) == 1:
        caches = [
            _fill(model, plan, *_room(model, plan, plan.capacity, kv_dtype), shared=False)
            for plan in plans
        ]
    else:
        keys, values = _room(model, plans[0], sum(plan.capacity for plan in plans), kv_dtype)
        caches, start = [], 0
        for plan in plans:
            own = slice(start, start + plan.capacity)
            start += plan.capacity
            caches.append(_fill(model, plan, keys[..., own, :], values[..., own, :], shared=True))
    # Last, because reading weights waits for the GPU, which places rows meanwhile.
    if plans:
        plans[0].check_weights(model)
    return caches


def check_stitchable(model: PreTrainedModel, requests: Sequence[Sequence[DocumentCache]]) -> None:
    """Raise the errors of `stitch_many` without stitching."""
    _checked(model, requests, None, "global", sample=True)


def _checked(
    model: PreTrainedModel,
    requests: Sequence[Sequence[DocumentCache]],
    orders: Sequence[Sequence[int] | None] | None,
    geometry: str,
    *,
    sample: bool = False,
) -> list[StitchPlan]:
    given = [None] * len(requests) if orders is None else list(orders)
    if len(given) != len(requests):
        raise InvalidInputError(
            f"{len(given)} orders were given for {len(requests)} requests; give one each, or none."
        )
    plans = []
    for index, (documents, order) in enumerate(zip(requests, given, strict=True)):
        with naming_request(index):
            plans.append(StitchPlan.checked(model, documents, order, geometry, sample=sample))
    return plans


def _room(
    model: PreTrainedModel, plan: StitchPlan, capacity: int, kv_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Allocate buffers for keys and values, ``[layers, 1, kv_heads, capacity, head_dim]``."""
    depth, kv_heads, _, head_dim = plan.first.shape
    shape = (depth, 1, kv_heads, capacity, head_dim)
    dtype, device = kv_dtype or plan.first.dtype, model.device
    return empty(shape, dtype, device), empty(shape, dtype, device)


def _fill(
    model: PreTrainedModel, plan: StitchPlan, keys: Tensor, values: Tensor, *, shared: bool
) -> StitchedCache:
    """Stitch into buffers; ``shared`` says that other caches lie in the same allocation."""
    handle, device = handle_of(model), model.device
    placed, parts, length = plan.placed, plan.parts, plan.placed.length
    dtype, rounded = plan.first.dtype, keys.dtype == FLOAT8
    # Rows to be quantized are rotated in at least float32, so that they are rounded once.
    turning = torch.promote_types(dtype, torch.float32) if rounded else dtype
    cos, sin = handle.rope.cos_sin(placed.positions.to(device), turning)
    loader = None
    scales: list[KVScales] = []
    if any(part.lazy for part in parts):
        loader = LayerLoader(parts, keys, values, cos, sin)
    elif rounded:
        for index in range(len(keys)):
            rows = [(p.keys[index].to(device), p.values[index].to(device)) for p in parts]
            scales.append(place_rounded(rows, cos, sin, keys[index, 0], values[index, 0]))
    else:
        slot = 0
        for part in parts:
            own = slice(slot, slot + len(part))
            place(
                part.keys.to(device, non_blocking=True),
                part.values.to(device, non_blocking=True),
                cos[own],
                sin[own],
                keys[:, 0],
                values[:, 0],
                slot,
            )
            slot = own.stop
    refusal = ""
    if placed.geometry != "global":
        refusal = (
            f"this cache has geometry {placed.geometry!r}, whose positions overlap; it can only be "
            "scored. Stitch with geometry='global' to recompute or answer."
        )
    layers: list[StitchedLayer] = []
    for index, (k, v) in enumerate(zip(keys, values, strict=True)):
        if not rounded:
            layers.append(StitchedLayer(k, v, length, refusal))
            continue
        own_scales = scales[index] if scales else UNSCALED  # a loader's come with the rows
        layers.append(FP8Layer(k, v, length, dtype, refusal, own_scales))
    for layer in layers:
        layer.shared = shared
        if handle.rope.rope_type == "longrope":
            layer.limit = handle.rope.limit - (placed.extent - length)  # of slots
    if loader is not None:
        for index, layer in enumerate(layers):
            layer.settle = functools.partial(_load, loader, index, layer)
    token_ids = torch.cat([part.token_ids for part in parts]).to(device)
    cache = StitchedCache(
        layers,
        token_ids,
        placed,
        plan.order,
        [document.sensitivity for document in plan.documents],
        [document.surrogate for document in plan.documents],
        [document.images for document in plan.documents],
        plan.first.fingerprint,
        handle.rope.axes,
    )
    cache.loader = loader
    return cache


def _load(loader: LayerLoader, index: int, layer: StitchedLayer) -> None:
    """Wait for a layer's rows, and take over their scales if the layer is FP8."""
    loader.ensure(index)
    if isinstance(layer, FP8Layer):
        layer.scales = loader.scales[index]
