"""``sensitivity-aware``: what the query looks at, weighed by how much it depends on context."""

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
    """``sink-aware`` with scores times a power of each token's sensitivity to context.

    What a stale slot costs is how much is read from it times how wrong it is. How wrong it will be
    behind other documents can be told before there is a question: tokens that move far behind one
    foreign text move far behind others. So the second factor, for which ``deviation-aware`` runs a
    layer at every request and CacheBlend (2405.16444) does, too, is measured here once a document,
    in all layers (`measure_sensitivities`).

    A session that chooses by this rule measures sensitivities when documents are added, for one
    more prefill of each, and its store keeps them. Of documents that reach a request without they
    are measured when the process first meets them, for two prefills, and remembered while it
    lasts. Neither is counted as a request's; beside it this costs what ``sink-aware`` does.

    Attributes:
        power: Of the sensitivity, above 0.
        sinks: As in ``sink-aware``.
        share: As in ``sink-aware``.
        layers: Scoring layers.
        query: Which tokens score, as in ``attention-norm``.
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
        """Scores times sensitivities, then as ``sink-aware``; outside of documents they stay."""
        parts, known = cache.document_slices, list(cache.sensitivities)
        lacking = [number for number in range(1, len(parts)) if known[number] is None]
        if lacking:
            ids = cache.token_ids.cpu()
            prefix_ids, documents = ids[: cache.prefix_length], [ids[parts[n]] for n in lacking]
            measured = _SENSITIVITIES.of(model, prefix_ids, documents)
            for number, found in zip(lacking, measured, strict=True):
                known[number] = found
        factors = torch.ones(len(scores))  # put together here: one copy to the device, not many
        for part, sensitivity in list(zip(parts, known, strict=True))[1:]:
            assert sensitivity is not None
            factors[part] = sensitivity
        weighed = scores * factors.to(scores.device) ** self.power
        return super().settle(model, cache, weighed)
