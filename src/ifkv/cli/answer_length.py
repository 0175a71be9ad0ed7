"""Option for the length of an answer."""

from __future__ import annotations

from typing import Annotated

import typer

MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        help="Largest number of tokens of an answer. Default: the value in the model's "
        "generation_config.json, else 64.",
        min=1,
        show_default=False,
    ),
]
