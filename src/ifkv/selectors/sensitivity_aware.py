"""``sensitivity-aware``: the query's attention, times the slot's sensitivity to context."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ifkv.documents.sensitivity import Sensitivities
from ifkv.errors import InvalidInputError
from ifkv.selectors.registry import register
from ifkv.selectors.sink_aware import SinkAware

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.cache.stitched import StitchedCache

_SENSITIVITIES = Sensitivities()


@register
@dataclasses.dataclass(frozen=True)
class SensitivityAware(SinkAware):
    """Selector ``sink-aware`` with scores times a power of each token's sensitivity.

    The error of a stale slot is how much is read from it times how wrong it is. The second factor
    is known before there is a question: tokens that move far behind one foreign text move far
    behind others. ``deviation-aware`` and CacheBlend (2405.16444) run a layer at every request to
    estimate it. Here it is measured once for each document, in all layers
    (`measure_sensitivities`).

    A session with this selector measures sensitivities when documents are added, for one more
    prefill of each, and its store keeps them. If a request has documents without sensitivities,
    they are measured once per process, for two prefills of each. Neither is counted as a request's
    cost, which is that of ``sink-aware``.

    Attributes:
        power: Power of the sensitivity, above 0.
        sinks: As in ``sink-aware``.
        share: As in ``sink-aware``.
        layers: Scoring layers.
        query: Tokens that score, as in ``attention-norm``.
        reduction: As in ``value-aware``.
    """

    name: ClassVar[str] = "sensitivity-aware"
    paper: ClassVar[str] = "our own, after CacheBlend, arXiv 2405.16444, and VATP, arXiv 2406.12335"
    only_scores: ClassVar[bool] = True
    sensitivities: ClassVar[bool] = True

    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power <= 0:
            raise InvalidInputError(
                f"{self.name}'s option power is {self.power}, but must be above 0; without "
                "sensitivities it is sink-aware."
            )

    def settle(self, model: PreTrainedModel, cache: StitchedCache, scores: Tensor) -> Tensor:
        """Multiply the documents' scores by sensitivities, then settle as ``sink-aware``."""
        parts, known = cache.document_slices, list(cache.sensitivities)
        stale = [n for n, rows in enumerate(parts) if rows.start >= cache.exact_length]
        lacking = [number for number in stale if known[number] is None]
        if any(cache.images[number] is not None for number in lacking):
            raise InvalidInputError(
                f"{self.name} cannot measure sensitivities of documents with pictures yet, which "
                "token ids do not tell apart; use sink-aware."
            )
        if lacking:
            ids = cache.token_ids.cpu()
            prefix_ids, documents = ids[: cache.prefix_length], [ids[parts[n]] for n in lacking]
            behind = [cache.surrogates[number] for number in lacking]
            measured = _SENSITIVITIES.of(model, prefix_ids, documents, behind)
            for number, found in zip(lacking, measured, strict=True):
                known[number] = found
        factors = torch.ones(len(scores))  # on the CPU: one copy to the device, not many
        for number in stale:
            sensitivity = known[number]
            assert sensitivity is not None
            factors[parts[number]] = sensitivity
        weighed = scores * factors.to(scores.device) ** self.power
        return super().settle(model, cache, weighed)
