"""The shape of a model that is not there yet: its config is enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ifkv.cost import ModelShape
from ifkv.errors import InvalidInputError
from ifkv.models.families import resolve_family

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def shape_of_config(config: PretrainedConfig, dtype: torch.dtype) -> ModelShape:
    """The shape of the model that a config describes; no weights are made.

    Raises:
        InvalidInputError: The config is not that of a causal language model.
        UnsupportedModelError: Its family is not supported.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise InvalidInputError(
            f"no plan can be made for a {config.model_type!r} model: {str(error).splitlines()[0]}"
        ) from error
    resolve_family(model)
    return ModelShape.of(model)
