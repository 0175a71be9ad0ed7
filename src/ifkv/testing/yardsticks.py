"""Native results of a model, and how far two native computations of the same thing may differ.

Two computations that are equal in mathematics differ in a model's rounding. In half precision, a
model differs from a float32 copy of itself by the rounding of its dtype. A quantized model has no
such copy. Its rows can depend on which others are computed with them, if kernels go by the number
of rows or activations are quantized together. Where it rounds to few bits, the last bit of an input
can decide. The same holds where rows are sent to experts: the last bit of an input can decide which
ones, and a router that computes in float32 rounds in a float64 model too. So the yardsticks of such
models are the distance of its own prefill from its prefill in pieces, and from a prefill of
embeddings that are off by a few roundings in float32.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ifkv.models.compat import cache_keyword
from ifkv.models.experts import has_experts
from ifkv.models.module_state import is_quantized
from ifkv.models.upstream_code import attention_function
from ifkv.patching.functions import unregister
from ifkv.steps.scoring_layers import default_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
_OBSERVING = "ifkv-observing"


@dataclasses.dataclass(frozen=True)
class NativePass:
    """Native results of a model for a context and the prompt after it.

    Attributes:
        cache: Keys and values of both.
        logits: Logits of the prompt's last row, ``[vocabulary]``.
        scores: The context's attention norms under the prompt, ``[T]``, as [ifkv.score][]
            defines them.
    """

    cache: DynamicCache
    logits: Tensor
    scores: Tensor


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """Largest deviation of two correct computations of one model, relative to the largest value.

    Attributes:
        rows: Deviation of keys, values and logits.
        scores: Deviation of attention norms.
    """

    rows: float
    scores: float


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest deviation, relative to the largest value expected; infinity for NaN."""
    scale = float(expected.abs().max())
    largest = float((actual.double() - expected.double()).abs().max()) / (scale or 1.0)
    return largest if largest == largest else float("inf")


def cache_error(cache: Any, truth: Any, slots: slice | Tensor, layers: range) -> float:
    """Return the largest `error` of keys and values of some slots in some layers."""
    return max(
        max(
            error(cache.layers[i].keys[:, :, slots], truth.layers[i].keys[:, :, slots]),
            error(cache.layers[i].values[:, :, slots], truth.layers[i].values[:, :, slots]),
        )
        for i in layers
    )


def native_pass(
    model: PreTrainedModel, rows: Tensor, total: int, pieces: Sequence[int] | None = None
) -> NativePass:
    """Run a context and a prompt through a model's own forward.

    Args:
        model: The model.
        rows: Token ids of both, ``[1, T + Q]``, or embeddings, ``[1, T + Q, hidden]``.
        total: Length of the context, T.
        pieces: Rows to run at a time, in order; all at once if None.
    """
    cuts = list(pieces or [rows.shape[1]])
    cache = DynamicCache()
    for part in rows.split(cuts, dim=1):
        logits = _forward(model, part, cache)
    return NativePass(cache, logits, native_scores(model, rows, total, DynamicCache(), cuts))


def native_scores(
    model: PreTrainedModel, rows: Tensor, total: int, cache: Any, pieces: Sequence[int]
) -> Tensor:
    """Return attention norms of a context, from the attentions of the model's own forward.

    Args:
        model: The model.
        rows: Rows to run over the cache, as in `native_pass`; the last are the prompt.
        total: Slots of the context.
        cache: Cache to append to.
        pieces: Rows to run at a time.

    Returns:
        ``[total]``, in float64.
    """
    held = cache.get_seq_length()
    seen: dict[int, list[Tensor]] = {}
    with _attentions(model) as found:
        for part in rows.split(list(pieces), dim=1):
            found.clear()
            _forward(model, part, cache)
            start, held = max(0, total - held), held + part.shape[1]
            for layer, weights in found.items() if held > total else ():
                of_prompt = weights[0, :, start:, :total].double().mean(0)
                seen.setdefault(layer, []).append(of_prompt)
    norms = [torch.cat(seen[layer]).norm(dim=0) for layer in default_layers(len(seen))]
    return torch.stack(norms).mean(dim=0)


def yardstick(model: PreTrainedModel, ids: Tensor, total: int, whole: NativePass) -> Yardstick:
    """Return how far correct computations of this model may differ from its own.

    Args:
        model: The model.
        ids: A context and a prompt of at least two tokens, ``[1, T + Q]``.
        total: Length of the context, T, at least 3.
        whole: The model's results for them in one pass.
    """
    least = TOLERANCE.get(whole.logits.dtype, 0.0)
    others = []
    quantized, routed = any(map(is_quantized, model.modules())), has_experts(model)
    if not least and not quantized:
        others.append(native_pass(copy.deepcopy(model).float(), ids, total))
    if quantized or routed:
        prompt = ids.shape[1] - total
        others += [
            native_pass(model, ids, total, pieces)
            for pieces in (
                (total, prompt),
                (1, total // 2, total - total // 2 - 1, prompt - 1, 1),
            )
        ]
        others += [native_pass(model, rows, total) for rows in _off_by_a_rounding(model, ids)]
    if not others:
        return Yardstick(least, least)
    every, layers = slice(None), range(len(whole.cache.layers))
    rows = [
        max(error(whole.logits, each.logits), cache_error(whole.cache, each.cache, every, layers))
        for each in others
    ]
    scores = [error(whole.scores, each.scores) for each in others]
    # Two computations that each keep within it may differ by twice as much.
    return Yardstick(max(least, 2 * max(rows)), max(least, 2 * max(scores)))


def _off_by_a_rounding(model: PreTrainedModel, ids: Tensor) -> Iterator[Tensor]:
    """Yield embeddings of tokens a few times, each time with different last bits."""
    exact: Tensor = model.get_input_embeddings()(ids)
    eps = torch.finfo(exact.dtype).eps
    # Roundings of a wide dtype add up on the way to a place where few bits are kept.
    size = max(eps, min(8 * eps, 1e-6))
    draw = torch.Generator().manual_seed(0)
    for _ in range(6):
        off = (torch.rand(exact.shape, generator=draw) * 2 - 1).to(exact.device)
        yield (exact * (1 + size * off)).to(exact.dtype)


def _forward(model: Any, rows: Tensor, cache: Any) -> Tensor:
    """Run rows after a cache and return the last one's logits, ``[vocabulary]``."""
    given = {"inputs_embeds" if rows.is_floating_point() else "input_ids": rows}
    out = model(**given, use_cache=True, **cache_keyword(model, cache))
    logits: Tensor = out.logits[0, -1]
    return logits


@contextmanager
def _attentions(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Make a model compute eager attention in the block, and collect every layer's weights.

    ``output_attentions`` would leave hooks on the model.

    Yields:
        The weights ``[1, heads, rows, slots]`` of the last forward, by layer.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    found: dict[int, Tensor] = {}

    def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        eager = attention_function(module, "eager_attention_forward")
        out = eager(module, *args, **kwargs)
        found[module.layer_idx] = out[1]
        return out

    before = model.config._attn_implementation
    AttentionInterface.register(_OBSERVING, attention)
    AttentionMaskInterface.register(_OBSERVING, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    try:
        model.set_attn_implementation(_OBSERVING)
        yield found
    finally:
        model.set_attn_implementation(before)
        unregister(_OBSERVING)
