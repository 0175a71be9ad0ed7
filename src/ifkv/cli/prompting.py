"""Options for the parts of a prompt other than documents and question."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from ifkv.session.prompt_format import PromptOptions


def variables_of(text: str) -> dict[str, Any]:
    """Return the variables of a chat template as written on the command line.

    Raises:
        typer.BadParameter: The text is not a JSON object.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{text!r} is not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{text!r} is not a JSON object such as '{{\"name\": false}}'.")
    return found


System = Annotated[
    str | None,
    typer.Option(
        help="System prompt. Default: what the chat template says without one.",
        show_default=False,
    ),
]
ChatTemplateKwargs = Annotated[
    Any,
    typer.Option(
        help="Variables of the chat template as a JSON object, such as "
        "'{\"enable_thinking\": false}'.",
        parser=variables_of,
        metavar="JSON",
        show_default=False,
    ),
]
Date = Annotated[
    str | None,
    typer.Option(
        help="Date that the chat template prints as today's, such as 2026-01-31. With "
        "'today', stored documents are not found tomorrow. Default: always the same date.",
        show_default=False,
    ),
]
ControlTokens = Annotated[
    Literal["text", "parse"],
    typer.Option(
        help="Meaning of control tokens such as <|im_end|> in files and questions: ordinary "
        "text (text), or what they are in the chat template (parse)."
    ),
]


def prompt_options(
    system: str | None,
    chat_template_kwargs: dict[str, Any] | None,
    date: str | None,
    control_tokens: Literal["text", "parse"],
) -> PromptOptions:
    """Return these options as `PromptFormat` takes them, and as questions need them too."""
    return {
        "system": system,
        "chat_template_kwargs": chat_template_kwargs,
        "date": date,
        "control_tokens": control_tokens,
    }
