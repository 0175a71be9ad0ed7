"""How command lines say what a prompt has besides documents and question."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from ifkv.session.prompt_format import PromptOptions


def variables_of(text: str) -> dict[str, Any]:
    """Variables of a chat template as written on the command line.

    Raises:
        typer.BadParameter: They are no JSON object.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{text!r} is no JSON ({error}).") from error
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{text!r} is no JSON object, such as '{{\"name\": false}}'.")
    return found


System = Annotated[
    str | None,
    typer.Option(
        help="The system prompt; what the chat template says by itself if not given.",
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
        help="What the chat template prints for today's date: a date such as 2026-01-31, or "
        "'today', with which documents are not found tomorrow. Always the same if not given.",
        show_default=False,
    ),
]
ControlTokens = Annotated[
    Literal["text", "parse"],
    typer.Option(
        help="What control tokens such as <|im_end|> are in files and questions: letters like any "
        "others (text), or what they are in the chat template (parse)."
    ),
]


def prompt_options(
    system: str | None,
    chat_template_kwargs: dict[str, Any] | None,
    date: str | None,
    control_tokens: Literal["text", "parse"],
) -> PromptOptions:
    """These options as `PromptFormat` takes them; questions need the same."""
    return {
        "system": system,
        "chat_template_kwargs": chat_template_kwargs,
        "date": date,
        "control_tokens": control_tokens,
    }
