"""The laws of the method, checked on one model: what ``ifkv verify`` runs.

Each law compares the fast path with a native forward of the same model on the same token ids, so
nothing but the model is trusted. Tolerances: 1e-10 in float64 and 1e-5 in float32, relative to the
largest value compared. In half precision the yardstick is the model's own rounding: how far its
native forward lies from that of a float32 copy; two computations that each keep within it may lie
twice as far apart. Laws that promise equal bits are held to equal bits.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ifkv.document_ids import no_padding
from ifkv.documents import DocumentCache, prefill_documents
from ifkv.generation import generate
from ifkv.patching import patch
from ifkv.plain_decoding import plain_decoding
from ifkv.recomputation import recompute
from ifkv.scoring import score
from ifkv.selection import select
from ifkv.stitching import stitch
from ifkv.upstream import cache_keyword

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.stitched_cache import StitchedCache

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
POISON = 1e9


@dataclasses.dataclass(frozen=True)
class LawResult:
    """One law, measured.

    Attributes:
        law: What must hold.
        error: Largest deviation, relative to the largest value compared.
        tolerance: The largest that is allowed; 0 where bits must be equal.
    """

    law: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the law holds on this model."""
        return self.error <= self.tolerance


def _error(actual: Tensor, expected: Tensor) -> float:
    scale = float(expected.abs().max())
    error = float((actual.double() - expected.double()).abs().max()) / (scale or 1.0)
    return error if error == error else float("inf")


def _cache_error(cache: Any, truth: Any, slots: slice | Tensor, layers: range) -> float:
    return max(
        max(
            _error(cache.layers[i].keys[:, :, slots], truth.layers[i].keys[:, :, slots]),
            _error(cache.layers[i].values[:, :, slots], truth.layers[i].values[:, :, slots]),
        )
        for i in layers
    )


@torch.no_grad()
def verify(model: PreTrainedModel, *, seed: int = 0, length: int = 48) -> Iterator[LawResult]:
    """Check the laws on a model with random token ids.

    Args:
        model: A causal language model in ``eval()`` mode. It is patched for the time
            being, and not patched afterwards. A half-precision one is copied to float32.
        seed: Seed of the token ids.
        length: Tokens of each of three documents, roughly.

    Yields:
        One result per law, as soon as it is measured.

    Raises:
        IfkvError: The model is not supported; nothing has been measured then.
    """
    native: Any = model
    draw = torch.Generator().manual_seed(seed)
    vocabulary = int(native.get_input_embeddings().weight.shape[0])

    def tokens(n: int) -> list[int]:
        return torch.randint(0, vocabulary, (n,), generator=draw).tolist()

    prefix, prompt = tokens(4), tokens(8)
    parts = [tokens(length), tokens(length // 2), tokens(length + 7)]
    context = prefix + [t for part in parts for t in part]
    ids = torch.tensor([context + prompt], device=model.device)
    total, first = len(context), len(prefix) + len(parts[0])
    before = native(ids).logits
    tolerance = TOLERANCE.get(before.dtype) or 2 * _rounding(native, ids, total)

    with patch(model):
        yield LawResult(
            "a patched model without our caches gives the same bits",
            0.0 if torch.equal(native(ids).logits, before) else float("inf"),
            0.0,
        )
        truth = DynamicCache()
        expected = native(ids, use_cache=True, **cache_keyword(native, truth)).logits[0, -1]
        layers = range(len(truth.layers))
        mask = no_padding(parts)  # random ids may end in one that ends texts
        documents = prefill_documents(model, parts, attention_mask=mask, prefix=prefix)
        yield from _laws(
            model, documents, prompt, truth, expected, _Sizes(total, first, layers), tolerance
        )
        alone = prefill_documents(model, [parts[1]], prefix=prefix)[0]
        yield LawResult(
            "8: a document's cache does not depend on its neighbours",
            max(
                _error(alone.keys, documents[1].keys),
                _error(alone.values, documents[1].values),
            ),
            tolerance,
        )


def _rounding(native: Any, ids: Tensor, total: int) -> float:
    """How far a half-precision model lies from a float32 copy of itself."""
    exact = copy.deepcopy(native).float()
    caches = (DynamicCache(), DynamicCache())
    logits = [
        one(ids, use_cache=True, **cache_keyword(one, cache)).logits[0, -1]
        for one, cache in zip((native, exact), caches, strict=True)
    ]
    layers = range(len(caches[0].layers))
    return max(_error(*logits), _cache_error(*caches, slice(0, total), layers))


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Slots of the context, the first slot that is not exact already, and all layers."""

    total: int
    first: int
    layers: range


def _laws(
    model: PreTrainedModel,
    documents: list[DocumentCache],
    prompt: list[int],
    truth: Any,
    expected: Tensor,
    sizes: _Sizes,
    tolerance: float,
) -> Iterator[LawResult]:
    total, first, layers = sizes.total, sizes.first, sizes.layers
    everything = slice(0, total)
    stitched = stitch(model, documents)
    yield LawResult(
        "4: layer 0 is exact for all slots without recompute",
        _cache_error(stitched, truth, everything, range(1)),
        tolerance,
    )
    yield LawResult(
        "5: prefix and first document are exact in every layer",
        _cache_error(stitched, truth, slice(0, first), layers),
        tolerance,
    )

    whole = stitched.clone()
    logits = recompute(model, whole, range(total), prompt_ids=prompt)
    assert logits is not None
    yield LawResult(
        "1: with everything recomputed, keys and values equal full prefill",
        _cache_error(whole, truth, everything, layers),
        tolerance,
    )
    yield LawResult("1: ... and so do the logits", _error(logits, expected), tolerance)
    rest = stitched.clone()
    logits = recompute(model, rest, range(first, total), prompt_ids=prompt)
    assert logits is not None
    yield LawResult(
        "2: prefix and first document need no recompute", _error(logits, expected), tolerance
    )
    with plain_decoding(model):
        same = generate(model, rest, prompt, max_new_tokens=4)
    yield LawResult(
        "generate() continues with the token the logits choose",
        0.0 if int(same[0, len(prompt)]) == int(logits.argmax()) else float("inf"),
        0.0,
    )

    scores = score(model, stitched, prompt)
    slots = select(stitched, scores, ratio=0.2)
    yield from _selection_laws(model, stitched, slots, prompt, truth, tolerance)


def _selection_laws(
    model: PreTrainedModel,
    stitched: StitchedCache,
    slots: Tensor,
    prompt: list[int],
    truth: Any,
    tolerance: float,
) -> Iterator[LawResult]:
    layers = range(len(stitched.layers))
    everything = slice(0, stitched.context_length)
    cache = stitched.clone()
    recompute(model, cache, slots)
    if len(layers) > 1:
        yield LawResult(
            "7: layer 1 is exact at selected slots",
            _cache_error(cache, truth, slots, range(1, 2)),
            tolerance,
        )
    kept = torch.ones(stitched.context_length, dtype=torch.bool, device=slots.device)
    kept[slots] = False
    untouched = kept.nonzero()[:, 0]
    equal = all(
        torch.equal(a.keys[:, :, untouched], b.keys[:, :, untouched])
        and torch.equal(a.values[:, :, untouched], b.values[:, :, untouched])
        for a, b in zip(cache.layers, stitched.layers, strict=True)
    )
    yield LawResult(
        "12: slots that were not selected keep their bits", 0.0 if equal else float("inf"), 0.0
    )

    again = cache.clone()
    recompute(model, again, slots)
    yield LawResult(
        "9: recomputing twice changes nothing more",
        _cache_error(again, cache, everything, layers),
        tolerance,
    )
    poisoned = stitched.clone()
    for layer in poisoned.layers:
        layer.keys[:, :, slots] = POISON
        layer.values[:, :, slots] = POISON
    recompute(model, poisoned, slots)
    yield LawResult(
        "10: old values at selected slots are never read",
        _cache_error(poisoned, cache, everything, layers),
        tolerance,
    )
    blocks = stitched.clone()
    recompute(model, blocks, slots, block_tokens=5)
    yield LawResult(
        "14: ascending blocks equal one pass",
        _cache_error(blocks, cache, everything, layers),
        tolerance,
    )
    fused = stitched.clone()
    together = recompute(model, fused, slots, prompt_ids=prompt)
    one_by_one = recompute(model, cache, [], prompt_ids=prompt)
    assert together is not None
    assert one_by_one is not None
    yield LawResult(
        "17: recompute and prompt in one forward equal one after the other",
        _error(together, one_by_one),
        tolerance,
    )
