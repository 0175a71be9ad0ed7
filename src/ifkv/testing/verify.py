"""Properties of the method, checked on one model: the work of ``ifkv verify``.

Each check compares the fast path with a native forward of the same model on the same token ids, so
nothing but the model is trusted. Tolerances are relative to the largest value compared: 1e-10 in
float64 and 1e-5 in float32; in half precision, and for quantized models, twice the distance between
the model's own computations (`ifkv.testing.yardsticks`). Properties that promise equal bits must
give equal bits. Tokens are not compared, since any of several equally likely ones may be chosen.
The names are those of the list in ``docs/method.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.cache.stitch import stitch
from ifkv.documents.cache import DocumentCache
from ifkv.documents.prefill import prefill_documents
from ifkv.documents.token_ids import no_padding
from ifkv.generation.generate import generate
from ifkv.models.module_state import settle
from ifkv.patching.handle import check_model, patch
from ifkv.steps.recompute import recompute
from ifkv.steps.score import score
from ifkv.steps.select import select
from ifkv.testing.plain_decoding import plain_decoding
from ifkv.testing.yardsticks import (
    TOLERANCE,
    NativePass,
    Yardstick,
    cache_error,
    error,
    native_pass,
    native_scores,
    yardstick,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache

SINGLE = TOLERANCE[torch.float32]
POISON = 1e9


@dataclasses.dataclass(frozen=True)
class PropertyResult:
    """Measured result for one property of the method.

    Attributes:
        name: The property, in words.
        error: Largest deviation, relative to the largest value compared.
        tolerance: Largest error that is allowed; 0 if bits must be equal.
    """

    name: str
    error: float
    tolerance: float

    @property
    def law(self) -> str:
        """Return the name."""
        return self.name

    @property
    def holds(self) -> bool:
        """True if the property holds on this model."""
        return self.error <= self.tolerance


LawResult = PropertyResult  # another name of it


@torch.no_grad()
def verify(model: PreTrainedModel, *, seed: int = 0, length: int = 48) -> Iterator[PropertyResult]:
    """Check the properties of the method on a model, with random token ids.

    Args:
        model: A causal language model in ``eval()`` mode. It is patched during the checks only. A
            half-precision model is copied to float32.
        seed: Seed of the token ids.
        length: Approximate number of tokens of each of three documents.

    Yields:
        One result per property, once it is measured.

    Raises:
        IfkvError: The model is not supported; nothing has been measured then.
    """
    check_model(model)
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
    settle(model)
    before = native(ids).logits
    truth = native_pass(model, ids, total)
    allowed = yardstick(model, ids, total, truth)

    with patch(model):
        yield PropertyResult(
            "a patched model without our caches gives the same bits",
            0.0 if torch.equal(native(ids).logits, before) else float("inf"),
            0.0,
        )
        mask = no_padding(parts)  # random ids may end in one that ends texts
        documents = prefill_documents(model, parts, attention_mask=mask, prefix=prefix)
        sizes = _Sizes(total, first, range(len(truth.cache.layers)))
        yield from _properties(model, documents, prompt, truth, sizes, allowed)
        alone = prefill_documents(model, [parts[1]], prefix=prefix)[0]
        yield PropertyResult(
            "documents are alone: a cache does not depend on its neighbours",
            max(
                error(alone.keys, documents[1].keys),
                error(alone.values, documents[1].values),
            ),
            allowed.rows,
        )
        texts = [tokens(length // 3), tokens(length // 2)]
        behind = prefill_documents(
            model, parts, attention_mask=mask, prefix=prefix, surrogate=texts
        )
        sizes = _Sizes(total, len(prefix), sizes.layers)
        yield from _surrogate_properties(model, behind, prompt, truth, sizes, allowed)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Sizes of the context: its slots, the first slot that is not exact already, and all layers."""

    total: int
    first: int
    layers: range


def _properties(
    model: PreTrainedModel,
    documents: list[DocumentCache],
    prompt: list[int],
    native: NativePass,
    sizes: _Sizes,
    allowed: Yardstick,
) -> Iterator[PropertyResult]:
    total, first, layers = sizes.total, sizes.first, sizes.layers
    truth, expected, tolerance = native.cache, native.logits, allowed.rows
    everything = slice(0, total)
    stitched = stitch(model, documents)
    yield PropertyResult(
        "first layer: right at every slot without recompute",
        cache_error(stitched, truth, everything, range(1)),
        tolerance,
    )
    yield PropertyResult(
        "first document: right in every layer, and so is the prefix",
        cache_error(stitched, truth, slice(0, first), layers),
        tolerance,
    )

    whole = stitched.clone()
    logits = recompute(model, whole, range(total), prompt_ids=prompt)
    assert logits is not None
    yield PropertyResult(
        "everything recomputed: keys and values equal full prefill's",
        cache_error(whole, truth, everything, layers),
        tolerance,
    )
    yield PropertyResult(
        "everything recomputed: logits equal full prefill's", error(logits, expected), tolerance
    )
    rest = stitched.clone()
    logits = recompute(model, rest, range(first, total), prompt_ids=prompt)
    assert logits is not None
    yield PropertyResult(
        "all but the exact rows: prefix and first document left out",
        error(logits, expected),
        tolerance,
    )
    with plain_decoding(model):
        answer = generate(
            model,
            rest,
            prompt,
            max_new_tokens=1,
            return_dict_in_generate=True,
            output_logits=True,
        )
    yield PropertyResult(
        "generate() continues from these logits",
        error(answer.logits[0][0], expected),
        max(tolerance, SINGLE),  # transformers hands them out in float32
    )

    scores = score(model, stitched, prompt)
    asked = torch.tensor([prompt], device=model.device)
    yield PropertyResult(
        "scores are the norms of the attentions that the model itself computes",
        error(scores, native_scores(model, asked, total, stitched.clone(), [len(prompt)])),
        max(allowed.scores, SINGLE),  # eager attention is computed in float32
    )
    slots = select(stitched, scores, ratio=0.2)
    yield from _selection_properties(model, stitched, slots, prompt, truth, tolerance)


def _surrogate_properties(
    model: PreTrainedModel,
    documents: list[DocumentCache],
    prompt: list[int],
    native: NativePass,
    sizes: _Sizes,
    allowed: Yardstick,
) -> Iterator[PropertyResult]:
    """Check what holds of documents encoded behind a surrogate context, as of any others."""
    stitched = stitch(model, documents)
    yield PropertyResult(
        "behind a surrogate context: the first layer is right, and the prefix in every layer",
        max(
            cache_error(stitched, native.cache, slice(0, sizes.total), range(1)),
            cache_error(stitched, native.cache, slice(0, stitched.exact_length), sizes.layers),
        ),
        allowed.rows,
    )
    logits = recompute(model, stitched, range(sizes.total), prompt_ids=prompt)
    assert logits is not None
    yield PropertyResult(
        "behind a surrogate context: everything recomputed equals full prefill",
        max(
            error(logits, native.logits),
            cache_error(stitched, native.cache, slice(0, sizes.total), sizes.layers),
        ),
        allowed.rows,
    )


def _selection_properties(
    model: PreTrainedModel,
    stitched: StitchedCache,
    slots: Tensor,
    prompt: list[int],
    truth: Any,
    tolerance: float,
) -> Iterator[PropertyResult]:
    layers = range(len(stitched.layers))
    everything = slice(0, stitched.context_length)
    cache = stitched.clone()
    recompute(model, cache, slots)
    if len(layers) > 1:
        yield PropertyResult(
            "second layer: right at selected slots",
            cache_error(cache, truth, slots, range(1, 2)),
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
    yield PropertyResult(
        "unselected rows untouched: they keep their bits", 0.0 if equal else float("inf"), 0.0
    )

    again = cache.clone()
    recompute(model, again, slots)
    yield PropertyResult(
        "twice is once: recomputing again changes nothing",
        cache_error(again, cache, everything, layers),
        tolerance,
    )
    poisoned = stitched.clone()
    for layer in poisoned.layers:
        layer.keys[:, :, slots] = POISON
        layer.values[:, :, slots] = POISON
    recompute(model, poisoned, slots)
    yield PropertyResult(
        "old rows unread: what stood at selected slots has no influence",
        cache_error(poisoned, cache, everything, layers),
        tolerance,
    )
    blocks = stitched.clone()
    recompute(model, blocks, slots, block_tokens=5)
    yield PropertyResult(
        "blocks: front to back they equal one pass",
        cache_error(blocks, cache, everything, layers),
        tolerance,
    )
    fused = stitched.clone()
    together = recompute(model, fused, slots, prompt_ids=prompt)
    one_by_one = recompute(model, cache, [], prompt_ids=prompt)
    assert together is not None
    assert one_by_one is not None
    yield PropertyResult(
        "fused with the prompt: one pass equals two",
        error(together, one_by_one),
        tolerance,
    )
