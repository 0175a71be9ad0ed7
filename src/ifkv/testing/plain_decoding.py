"""Decode as the logits say, whatever a model's generation config makes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def plain_decoding(model: PreTrainedModel) -> Iterator[None]:
    """Set a model's generation config aside for a block, so that nothing but tokens is decided.

    Args:
        model: The model, which nobody else may use meanwhile.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
