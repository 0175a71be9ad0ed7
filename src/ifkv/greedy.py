"""What decides a greedy answer, and which settings leave nothing else to decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings that a greedy decoding of one sequence never looks at, or that ifkv takes care of.
_IDLE = frozenset(
    {
        "_commit_hash",
        "_from_model_config",
        "bos_token_id",
        "do_sample",
        "early_stopping",
        "eos_token_id",
        "epsilon_cutoff",
        "eta_cutoff",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_p",
        "pad_token_id",
        "repetition_penalty",
        "temperature",
        "tokenizer",
        "top_h",
        "top_k",
        "top_p",
        "transformers_version",
        "typical_p",
        "use_cache",
    }
)


@dataclasses.dataclass(frozen=True)
class GreedySettings:
    """What decides a greedy answer.

    Attributes:
        eos_token_ids: Tokens that end it.
        repetition_penalty: Of tokens that are there already, context and prompt included; 1 is
            none.
    """

    eos_token_ids: frozenset[int]
    repetition_penalty: float = 1.0


def greedy_settings(model: PreTrainedModel, given: dict[str, Any]) -> GreedySettings | str:
    """Settings for :func:`generate_many`, or the one setting that it has no part for.

    Args:
        model: The model, whose generation config counts.
        given: Keywords for ``model.generate()`` that come before it.

    Returns:
        The settings, or in words what asks for ``model.generate()`` itself.
    """
    config: Any = model.generation_config
    known = {**config.to_diff_dict(), **given}
    for name, value in known.items():
        if value is None or value is False or name in _IDLE:
            continue
        if name in ("num_beams", "num_return_sequences") and value == 1:
            continue
        return f"{name}={value!r}"
    if given.get("do_sample", False):
        return "do_sample=True"
    ends = known.get("eos_token_id")
    if isinstance(ends, Tensor):
        ends = ends.flatten().tolist()
    ids = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    penalty = known.get("repetition_penalty")
    return GreedySettings(frozenset(ids), 1.0 if penalty is None else float(penalty))


def penalised(logits: Tensor, seen: Sequence[Tensor], penalty: float) -> Tensor:
    """Logits as transformers' own processor of this name leaves them, row by row."""
    from transformers import RepetitionPenaltyLogitsProcessor

    processor = RepetitionPenaltyLogitsProcessor(penalty=penalty)
    rows = [processor(ids[None], row[None]) for ids, row in zip(seen, logits, strict=True)]
    return torch.cat(rows)
