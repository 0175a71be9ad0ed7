"""Decoding by the logits alone, whatever a model's generation config says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def plain_decoding(model: PreTrainedModel) -> Iterator[None]:
    """Set a model's generation config aside for a block, so that only the logits decide the tokens.

    Args:
        model: The model; nobody else may use it meanwhile.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
