"""Checks of a model's ``generation_config.json``, before its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ifkv.cli.placement import first_line
from ifkv.errors import InvalidInputError

if TYPE_CHECKING:
    from ifkv.generation.settings import GenerationSettings


def check_generation(name: str, max_new_tokens: int | None = None) -> GenerationSettings:
    """Refuse settings of a model's ``generation_config.json`` that ifkv does not support.

    Args:
        name: Folder or hub id of the model.
        max_new_tokens: Largest length of an answer; it overrides the file's.

    Returns:
        Settings of the file and of the arguments.

    Raises:
        InvalidInputError: The file holds such a setting, or cannot be read.
    """
    from transformers import GenerationConfig

    from ifkv.generation.checks import check_configs, check_one_answer
    from ifkv.generation.settings import GenerationSettings

    file, config = Path(name) / "generation_config.json", None
    if file.exists() or not Path(name).is_dir():
        try:
            config = GenerationConfig.from_pretrained(name)
        except (OSError, ValueError, TypeError) as error:
            if file.exists():  # else of the hub, where a model need not have one
                raise InvalidInputError(
                    f"{file} cannot be used ({first_line(error)}); mend it, or take it away."
                ) from error
    given = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    settings = GenerationSettings(given, config)
    check_one_answer(settings)
    check_configs(settings)
    return settings
