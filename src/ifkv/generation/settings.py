"""Settings of ``generate()``, found in every place where they may be given.

A setting may be given as a keyword, in a ``generation_config`` given with the question, and in the
model's own ``generation_config``, which ``generation_config.json`` fills. They come in this order;
a default here decides what none of them sets. Every way of asking uses these rules.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ifkv.errors import InvalidInputError
from ifkv.generation.default_length import DEFAULT_MAX_NEW_TOKENS as DEFAULT_MAX_NEW_TOKENS
from ifkv.utils.checks import check_positive

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


_KEYWORD = "given as a keyword"
_CONFIG = "in the generation config given"
_OWN = "in the model's generation config (generation_config.json)"
_LENGTHS = ("max_new_tokens", "max_length", "min_new_tokens", "min_length")


@dataclasses.dataclass(frozen=True, eq=False)
class GenerationSettings:
    """Settings of one question, or of several that are asked alike.

    Attributes:
        given: Keywords for ``model.generate()``.
        own: The model's generation config; None if it has none.
    """

    given: Mapping[str, Any]
    own: GenerationConfig | None

    @classmethod
    def of(cls, model: PreTrainedModel, given: Mapping[str, Any]) -> GenerationSettings:
        """Make settings of a model and of keywords, which come before the model's config."""
        return cls(dict(given), model.generation_config)

    @property
    def config(self) -> Any:
        """Return the generation config that was given with the question, or None."""
        return self.given.get("generation_config")

    def stopped_by(self, criterion: Callable[..., Any]) -> GenerationSettings:
        """Return these settings with one more stopping criterion."""
        criteria = [*(self.given.get("stopping_criteria") or ()), criterion]
        return GenerationSettings({**self.given, "stopping_criteria": criteria}, self.own)

    def said(self, name: str) -> tuple[Any, str]:
        """Find a setting as ``generate()`` does, and the place where it was set.

        Returns:
            Its value, None if it is not set, and the place in words.
        """
        if name in self.given:
            return self.given[name], _KEYWORD
        value = getattr(self.config, name, None)
        if value is not None:
            return value, _CONFIG
        return getattr(self.own, name, None), _OWN

    def get(self, name: str) -> Any:
        """Return a setting as ``generate()`` finds it; None if it is not set."""
        return self.said(name)[0]

    @functools.cached_property
    def effective(self) -> GenerationConfig:
        """Merge all places into one config, as ``generate()`` does; lengths are left out.

        Raises:
            InvalidInputError: transformers refuses their combination.
        """
        from transformers import GenerationConfig

        merged = GenerationConfig() if self.config is None else copy.deepcopy(self.config)
        own = {} if self.own is None else self.own.to_dict()
        for name in _LENGTHS:
            setattr(merged, name, None)
            own.pop(name, None)
        named = {name: value for name, value in self.given.items() if name not in _LENGTHS}
        try:
            merged.update(**own, defaults_only=True, allow_custom_entries=True)
            merged.update(**named)
        except (ValueError, TypeError) as error:
            raise refused_upstream(error) from error
        return merged

    @property
    def beams(self) -> int:
        """Return the number of beams."""
        return int(self.get("num_beams") or 1)

    @property
    def sequences(self) -> int:
        """Return the number of sequences that ``generate()`` runs, and the cache must hold."""
        return max(self.beams, int(self.get("num_return_sequences") or 1))

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Return the tokens that end an answer."""
        import torch

        given = self.get("eos_token_id")
        if given is None:
            return frozenset()
        return frozenset(torch.as_tensor(given).flatten().tolist())

    @property
    def counts_prompt(self) -> bool:
        """True if the answer's length depends on the prompt's, and maybe the context's."""
        return self._most()[0] == "max_length"

    def check_lengths(self) -> None:
        """Refuse a length that is no whole number of at least 1.

        Raises:
            InvalidInputError: The length that counts is none.
        """
        self._most()

    def new_tokens(self, context: int, prompt: int) -> int:
        """Return the number of tokens that the answer may have.

        ``max_length`` counts from the prompt's start. In the model's own config it counts from the
        context's, as after a full prefill.

        Args:
            context: Tokens before the prompt.
            prompt: Tokens of the prompt.

        Raises:
            InvalidInputError: The length is no whole number of at least 1, or the prompt alone
                reaches it.
        """
        name, value, place = self._most()
        if name == "max_new_tokens":
            return value
        whole = place == _OWN
        before = prompt + context if whole else prompt
        if value <= before:
            what = "context and prompt have" if whole else "the prompt alone has"
            raise InvalidInputError(
                f"max_length is {value} {place}, but {what} {before} tokens; give max_new_tokens, "
                "which counts the answer alone."
            )
        return value - before

    def least_new_tokens(self, context: int, prompt: int) -> int | None:
        """Return the least number of tokens before a stop token; None if it is not set."""
        for _, says, before in self._places(context, prompt):
            if says.get("min_new_tokens") is not None:
                return int(says["min_new_tokens"])
            if says.get("min_length") is not None:
                return max(0, int(says["min_length"]) - before)
        return None

    def keywords(
        self, context: int, prompt: int, *, overrides: Mapping[str, Any], **defaults: Any
    ) -> dict[str, Any]:
        """Make keywords for ``model.generate()`` over context and prompt.

        Args:
            context: Tokens before the prompt.
            prompt: Tokens of the prompt.
            overrides: Settings that come before all others.
            **defaults: Settings that are used if no place sets them; None for none.

        Returns:
            The given keywords, with lengths as ``generate()`` counts them.

        Raises:
            InvalidInputError: As of `new_tokens`.
        """
        kwargs = {name: value for name, value in self.given.items() if name not in _LENGTHS}
        decided = {
            name: value
            for name, value in defaults.items()
            if value is not None and self.get(name) is None
        }
        decided |= {**overrides, "max_new_tokens": self.new_tokens(context, prompt)}
        least = self.least_new_tokens(context, prompt)
        if least is not None:
            decided["min_new_tokens"] = least
        if self.get("use_cache") is False:  # as fine-tuned checkpoints often have it
            decided["use_cache"] = True
        config = copy.deepcopy(self.config)
        if config is not None:  # generate() warns of keywords beside a config
            kwargs["generation_config"] = config
            for name in _LENGTHS:
                setattr(config, name, None)
            inside = [name for name in decided if hasattr(config, name) and name not in kwargs]
            for name in inside:
                setattr(config, name, decided.pop(name))
        kwargs |= decided
        if self.get("prefill_chunk_size") is not None:
            kwargs["prefill_chunk_size"] = None  # chunks would begin with the context
        return kwargs

    def _places(self, context: int, prompt: int) -> list[tuple[str, Mapping[str, Any], int]]:
        """Return each place, its settings, and the tokens its lengths count beside an answer."""
        configs = [{} if each is None else vars(each) for each in (self.config, self.own)]
        return [
            (_KEYWORD, self.given, prompt),
            (_CONFIG, configs[0], prompt),
            (_OWN, configs[1], context + prompt),
        ]

    def _most(self) -> tuple[str, int, str]:
        """Find what limits the answer: the setting, its value, and the place."""
        for place, says, _ in self._places(0, 0):
            for name in ("max_new_tokens", "max_length"):
                value = says.get(name)
                if value is not None:
                    check_positive(value, name if place == _KEYWORD else f"{name} {place}")
                    return name, int(value), place
        return "max_new_tokens", DEFAULT_MAX_NEW_TOKENS, ""


def refused_upstream(error: Exception) -> InvalidInputError:
    """Return an error of ifkv that holds transformers' message about settings."""
    found = " ".join(str(error).split())
    return InvalidInputError(f"generate() cannot be told this: {found}")
