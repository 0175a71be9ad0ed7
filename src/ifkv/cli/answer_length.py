"""The option of how long an answer may be."""

from __future__ import annotations

from typing import Annotated

import typer

MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of an answer at most; if not given, what the model's generation_config.json "
        "says, or 64.",
        min=1,
        show_default=False,
    ),
]
