"""Sensitivity: the change of a document's values when other text stands before it."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ifkv.cost import ModelShape
from ifkv.documents.cache import DocumentCache
from ifkv.documents.prefill import prefill_documents
from ifkv.documents.token_ids import no_padding
from ifkv.errors import InvalidInputError
from ifkv.patching.handle import handle_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.documents.surrogate import SurrogateContext

# What sensitivities are of: model, prefix, document, and the surrogate context's identity.
_Known = tuple[str, tuple[int, ...], tuple[int, ...], str | None]
# Tokens of other text. So many take the attention that a lone document gives to its beginning.
FOREIGN_TOKENS = 128
# Tokens whose sensitivities are kept, 4 bytes each.
REMEMBERED_TOKENS = 16 * 2**20


def foreign_tokens(vocabulary: int, count: int = FOREIGN_TOKENS) -> list[int]:
    """Return token ids that mean nothing together, spread over the vocabulary.

    Multiples of the golden ratio, modulo 1: the same everywhere, in no language.

    >>> foreign_tokens(1000, 4)
    [618, 236, 854, 472]
    """
    golden = (math.sqrt(5) - 1) / 2
    return [int(vocabulary * (number * golden % 1)) for number in range(1, count + 1)]


@torch.no_grad()
def measure_sensitivities(
    model: PreTrainedModel, documents: Sequence[DocumentCache]
) -> list[Tensor]:
    """Measure how far each token's values move when other text stands before its document.

    A document is prefilled once more, behind its prefix and `foreign_tokens` (fewer if the model
    has not enough positions), without a surrogate context. With ``v`` the document's values of
    token j in layer l, over all key heads, as it was encoded (alone, or behind its surrogate
    context), and ``w`` the same token's values in the second prefill,

        s[j] = mean over l of |w_l[j] - v_l[j]| / rms over j of |v_l[j]|

    with Euclidean norms.

    Args:
        model: A patched model.
        documents: Documents as the model made them, not rounded by a store. Their size is needed
            once more in memory.

    Returns:
        For each document float32 ``[n]``, on the CPU.

    Raises:
        NotPatchedError: The model is not patched.
        InvalidInputError: A document has pictures, or fills the model's positions by itself.
    """
    if any(document.images is not None for document in documents):
        raise InvalidInputError(
            "sensitivities of documents with pictures cannot be measured yet; use a selector that "
            "needs none, such as sink-aware."
        )
    limit = handle_of(model).rope.limit
    foreign = foreign_tokens(ModelShape.of(model).vocabulary)
    groups: dict[tuple[int, ...], list[int]] = {}  # by the ids in front of the documents
    for number, document in enumerate(documents):
        count = max(1, min(len(foreign), limit - len(document.prefix_ids) - len(document)))
        behind = (*document.prefix_ids.tolist(), *foreign[:count])
        groups.setdefault(behind, []).append(number)
    found: dict[int, Tensor] = {}
    for behind, numbers in groups.items():
        ids = [documents[number].token_ids for number in numbers]
        made = prefill_documents(model, ids, attention_mask=no_padding(ids), prefix=behind)
        for number, moved in zip(numbers, made, strict=True):
            found[number] = _moved_by(documents[number].values.to(model.device), moved.values)
    return [found[number] for number in range(len(documents))]


def _moved_by(old: Tensor, new: Tensor) -> Tensor:
    """Compute sensitivities from old and new values, both ``[layers, kv_heads, n, head_dim]``."""
    dtype = torch.promote_types(old.dtype, torch.float32)
    old, new = old.to(dtype), new.to(dtype)
    errors = (new - old).square().sum(dim=(1, 3)).sqrt()
    sizes = old.square().sum(dim=(1, 3)).mean(dim=1, keepdim=True).sqrt()
    relative = errors / sizes.clamp_min(torch.finfo(torch.float32).tiny)
    return relative.mean(dim=0).to("cpu", torch.float32)


def with_sensitivities(
    model: PreTrainedModel, documents: Sequence[DocumentCache]
) -> list[DocumentCache]:
    """Return the documents with their sensitivities; errors of `measure_sensitivities`."""
    measured = measure_sensitivities(model, documents)
    return [
        document.rebuilt(sensitivity=sensitivity)
        for document, sensitivity in zip(documents, measured, strict=True)
    ]


class Sensitivities:
    """Sensitivities of documents that have none, measured when they are first asked for.

    Threads may share it. The first request of a document pays two prefills, later ones nothing.

    Args:
        limit: Tokens whose sensitivities are kept; beyond it, the least recently used documents
            are forgotten.
    """

    def __init__(self, limit: int = REMEMBERED_TOKENS):
        self._limit = limit
        self._known: OrderedDict[_Known, Tensor] = OrderedDict()
        self._tokens = 0
        self._lock = threading.Lock()

    def of(
        self,
        model: PreTrainedModel,
        prefix_ids: Tensor,
        documents: Sequence[Tensor],
        surrogates: Sequence[SurrogateContext | None] | None = None,
    ) -> list[Tensor]:
        """Return the sensitivities of each document's tokens, float32 ``[n]``, on the CPU.

        They are those that `measure_sensitivities` finds of the documents as they were made.

        Args:
            model: A patched model.
            prefix_ids: The prefix of the documents, long ``[P]``, on the CPU.
            documents: Token ids of each, long ``[n]``, on the CPU.
            surrogates: The surrogate context that each was encoded behind, or None; None if
                all were encoded alone.

        Raises:
            NotPatchedError: The model is not patched.
            InvalidInputError: A document fills the model's positions by itself.
        """
        identity = handle_of(model).identity(model)
        before = tuple(prefix_ids.tolist())
        given = [None] * len(documents) if surrogates is None else surrogates
        contexts = {None if one is None else one.identity: one for one in given}
        keys = [
            (identity, before, tuple(ids.tolist()), None if one is None else one.identity)
            for ids, one in zip(documents, given, strict=True)
        ]
        with self._lock:  # two threads that measured the same would only wait for each other
            missing = list(dict.fromkeys(key for key in keys if key not in self._known))
            found = {key: self._known[key] for key in keys if key not in missing}
            for behind in dict.fromkeys(key[3] for key in missing):
                alike = [key for key in missing if key[3] == behind]
                texts = [key[2] for key in alike]
                again = prefill_documents(
                    model,
                    texts,
                    attention_mask=no_padding(texts),
                    prefix=before,
                    surrogate=contexts[behind],
                )
                made = measure_sensitivities(model, again)
                for key, sensitivity in zip(alike, made, strict=True):
                    found[key] = self._known[key] = sensitivity
                    self._tokens += len(sensitivity)
            for key in keys:
                self._known.move_to_end(key)
            while self._tokens > self._limit and len(self._known) > 1:
                _, forgotten = self._known.popitem(last=False)
                self._tokens -= len(forgotten)
        return [found[key] for key in keys]
