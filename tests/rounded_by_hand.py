"""The slow and obvious form of an 8-bit cache: wide rows, each put on the grid by arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

import ifkv
from flashinfer_standin import FlashInferStandIn
from ifkv.backends.flashinfer import FlashInferBackend
from ifkv.backends.fp8 import FLOAT8
from ifkv.backends.plans import KVScales
from ifkv.cache.layer import StitchedLayer
from ifkv.testing import assert_bit_equal


def on_grid(x: Tensor, scale: float) -> Tensor:
    """The nearest number of e4m3 times the scale, ties to even, in x's own dtype."""
    wide = x.double() / scale
    exponent = wide.abs().clamp(min=2.0**-6).log2().floor()
    step = torch.exp2(exponent - 3)  # 3 bits of mantissa; 2^-9 below 2^-6
    return ((wide / step).round() * step).clamp(-448, 448).mul(scale).to(x.dtype)


class HandRounded(StitchedLayer):
    """A plain layer whose rows are put on the grid as they come."""

    by_hand = KVScales()

    def write(self, slots, keys, values):
        super().write(slots, *self._rounded(keys, values))

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(*self._rounded(key_states, value_states))

    def clone(self):
        twin = HandRounded(
            self.key_buffer.clone(), self.value_buffer.clone(), self.length, self._refusal
        )
        twin.by_hand, twin.limit = self.by_hand, self.limit
        return twin

    def _rounded(self, keys, values):
        return on_grid(keys, self.by_hand.keys), on_grid(values, self.by_hand.values)


def rounded_by_hand(plain: ifkv.StitchedCache, like: ifkv.StitchedCache) -> ifkv.StitchedCache:
    """Turn a plain cache into the obvious form of a rounded one, with the latter's scales."""
    layers = []
    for layer, rounded in zip(plain.layers, like.layers, strict=True):
        keys = on_grid(layer.key_buffer.nan_to_num(), rounded.scales.keys)
        values = on_grid(layer.value_buffer.nan_to_num(), rounded.scales.values)
        twin = HandRounded(keys, values, layer.length, layer._refusal)
        twin.by_hand, twin.limit = rounded.scales, layer.limit
        layers.append(twin)
    plain.layers = layers
    return plain


BACKENDS = {
    "reference": "reference",
    **{
        mask: FlashInferBackend(FlashInferStandIn(relaxed=True), mask=mask, workspace_bytes=2**20)
        for mask in ("split", "positions")
    },
}
AXES = ("a", "b", "c", "d")
PREFIX = [1, 2]
DOCUMENTS = [[3 + (7 * i) % 90 for i in range(40)], [5, 6, 7], [9, 4] * 15]
PROMPT = [11, 12, 13, 14, 15]


def both(model, documents, **kwargs):
    """A rounded cache and its obvious form."""
    cache = ifkv.stitch(model, documents, kv_dtype=FLOAT8, **kwargs)
    return cache, rounded_by_hand(ifkv.stitch(model, documents, **kwargs), cache)


def assert_same_rows(cache, twin, what="rows"):
    for layer, by_hand in zip(cache.layers, twin.layers, strict=True):
        for name, got, want in zip(
            ("keys", "values"),
            layer.rows(slice(0, layer.length)),
            (by_hand.keys, by_hand.values),
            strict=True,
        ):
            assert_bit_equal(got, want, what=f"{name}: {what}", axes=AXES)
