"""Settings of a greedy answer, and the check that no other setting matters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ifkv.generation.checks import functions
from ifkv.generation.settings import GenerationSettings
from ifkv.generation.streaming import Closing

if TYPE_CHECKING:
    from transformers import GenerationConfig

# Settings that do not affect the greedy decoding of one sequence, or that ifkv handles.
_IDLE = frozenset(
    {
        "_commit_hash",
        "_from_model_config",
        "bos_token_id",
        "early_stopping",
        "eos_token_id",
        "disable_compile",
        "epsilon_cutoff",
        "eta_cutoff",
        "generation_config",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_p",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
        "pad_token_id",
        "prefill_chunk_size",
        "repetition_penalty",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "return_dict_in_generate",
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
# Values of other settings that have no effect.
_NEUTRAL: dict[str, Any] = {
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
}


@dataclasses.dataclass(frozen=True)
class GreedySettings:
    """Settings of a greedy answer.

    Attributes:
        eos_token_ids: Tokens that end it.
        repetition_penalty: Penalty of tokens that occur before, also in context and prompt; 1 is
            none.
        closings: What may end all answers early, as their streams are closed.
    """

    eos_token_ids: frozenset[int]
    repetition_penalty: float = 1.0
    closings: tuple[Closing, ...] = ()

    @property
    def closed(self) -> bool:
        """True if the answers shall end with the tokens that they have."""
        return any(closing.closed for closing in self.closings)


def greedy_settings(settings: GenerationSettings) -> GreedySettings | str:
    """Return settings for `generate_many`, or the setting that it does not support.

    Args:
        settings: All settings of an answer.

    Returns:
        The settings, or ``name=value`` of the setting that needs ``model.generate()``.
    """
    fields = dict(vars(settings.effective))
    declared = set(vars(_empty()))  # generate() ignores other entries of a file
    known = {name: value for name, value in fields.items() if name in declared}
    known |= {name: value for name, value in settings.given.items() if name not in fields}
    criteria = functions("stopping_criteria", known.pop("stopping_criteria", None))
    closings = tuple(each for each in criteria if isinstance(each, Closing))
    if len(closings) < len(criteria):
        return f"stopping_criteria={criteria!r}"
    for name, value in known.items():
        if value is None or value is False or name in _IDLE or value == _NEUTRAL.get(name):
            continue
        return f"{name}={value!r}"
    for name in ("min_new_tokens", "min_length"):
        if settings.get(name):
            return f"{name}={settings.get(name)!r}"
    penalty = settings.get("repetition_penalty")
    penalty = 1.0 if penalty is None else float(penalty)
    return GreedySettings(settings.stop_token_ids, penalty, closings)


@functools.cache
def _empty() -> GenerationConfig:
    from transformers import GenerationConfig

    return GenerationConfig()


def penalised(logits: Tensor, seen: Sequence[Tensor], penalty: float) -> Tensor:
    """Apply transformers' repetition penalty to logits, row by row."""
    from transformers import RepetitionPenaltyLogitsProcessor

    processor = RepetitionPenaltyLogitsProcessor(penalty=penalty)
    rows = [processor(ids[None], row[None]) for ids, row in zip(seen, logits, strict=True)]
    return torch.cat(rows)
