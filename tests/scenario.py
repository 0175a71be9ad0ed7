"""What the law tests start from: a random model, a random request and random choices about it.

Found by the tests because pytest puts this folder on the path (`pythonpath` in pyproject.toml).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor
from transformers import PreTrainedModel

import ifkv
from ifkv.testing import DenseTrace, assert_close, shared_tiny_model
from ifkv.testing.strategies import ModelOptions, Request, model_options, orders, requests
from ifkv.testing.strategies import slot_subsets as subsets
from tried import FAMILIES

EXACT = 1e-11
"""Tolerance in float64 with wide norms; 1e-13 is what is seen, of values of a few units."""


@dataclass(frozen=True)
class Scenario:
    """Everything random about one example.

    Attributes:
        options: The model.
        request: Its token ids.
        order: A permutation of the documents.
        slots: A selection of the context's slots, ascending.
    """

    options: ModelOptions
    request: Request
    order: list[int]
    slots: list[int]

    @property
    def model(self) -> PreTrainedModel:
        return shared_tiny_model(**dataclasses.asdict(self.options))

    @property
    def total(self) -> int:
        return len(self.request.context)


@st.composite
def scenarios(
    draw: st.DrawFn, *, min_documents: int = 1, min_slots: int = 0, sliding: bool = True
) -> Scenario:
    """Any family, rope type that can be moved, head geometry, window, request, order, selection."""
    options = draw(model_options(sliding=sliding, among=FAMILIES))
    if options.family == "phi3" and draw(st.booleans()):
        # Upstream's config refuses longrope factors for a head_dim of its own.
        options = dataclasses.replace(options, rope="longrope", head_dim=None)
    # Short enough to stay below the crossing of longrope.
    request = draw(requests(min_documents=min_documents, max_documents=4, max_length=10))
    return Scenario(
        options=options,
        request=request,
        order=draw(orders(len(request.documents))),
        slots=draw(subsets(len(request.context), min_size=min_slots)),
    )


@dataclass(frozen=True)
class Bench:
    """A patched model with a request's documents prefilled."""

    model: PreTrainedModel
    request: Request
    documents: list[ifkv.DocumentCache]

    def stitch(
        self, order: Sequence[int] | None = None, geometry: str = "global"
    ) -> ifkv.StitchedCache:
        return ifkv.stitch(self.model, self.documents, order=order, geometry=geometry)

    def recomputed(
        self, slots: Sequence[int], order: Sequence[int] | None = None
    ) -> ifkv.StitchedCache:
        cache = self.stitch(order)
        ifkv.recompute(self.model, cache, slots)
        return cache


@contextmanager
def prepared(model: PreTrainedModel, request: Request) -> Iterator[Bench]:
    """Patch the model, prefill the request's documents, and unpatch in the end."""
    with ifkv.patch(model):
        documents = ifkv.prefill_documents(model, request.documents, prefix=request.prefix)
        yield Bench(model, request, documents)


def keys_of(cache: ifkv.StitchedCache) -> Tensor:
    """Rotated keys of all layers, `[L, H_kv, N, D]`."""
    return torch.cat([layer.keys for layer in cache.layers])


def values_of(cache: ifkv.StitchedCache) -> Tensor:
    """Values of all layers, `[L, H_kv, N, D]`."""
    return torch.cat([layer.values for layer in cache.layers])


def assert_rows_equal(
    cache: ifkv.StitchedCache,
    expected: DenseTrace | ifkv.StitchedCache,
    *,
    what: str,
    rows: slice | Sequence[int] = slice(None),
    layers: slice = slice(None),
    tolerance: float = EXACT,
) -> None:
    """Assert that keys and values agree at the given slots, in the given layers."""
    if isinstance(expected, DenseTrace):
        keys, values = expected.keys, expected.values
    else:
        keys, values = keys_of(expected), values_of(expected)
    for name, got, want in (("keys", keys_of(cache), keys), ("values", values_of(cache), values)):
        assert_close(
            got[layers][:, :, rows],
            want[layers][:, :, rows],
            what=f"{name} {what}",
            tolerance=tolerance,
        )


def poison(cache: ifkv.StitchedCache, slots: Sequence[int] | slice, value: float) -> None:
    """Overwrite slots of the buffers, those behind the context included, in all layers."""
    for layer in cache.layers:
        layer.key_buffer[:, :, slots] = value
        layer.value_buffer[:, :, slots] = value


def cache_of(output: Any) -> Any:
    """The cache that a model's output holds: under one name from transformers 5.24 on, before that
    under another."""
    return output.cache if hasattr(output, "cache") else output.past_key_values
