"""``ifkv families``: model types that work, and why the others do not."""

from __future__ import annotations

from typing import Annotated

import typer


def families(
    model_type: Annotated[
        str | None,
        typer.Argument(help="One model type, as a model's config.json names it; all if left out."),
    ] = None,
    refused: Annotated[
        bool, typer.Option("--refused", help="List the model types that are refused, and why.")
    ] = False,
) -> None:
    """List the model types that work, with examples and limits."""
    from types import SimpleNamespace

    from ifkv.models.families import describe, families, family_of, reasons
    from ifkv.models.wrappers import wrappers

    around = {name: each for each in wrappers().values() for name in each.model_types}
    if model_type in around:
        typer.echo(around[model_type].description)
    elif model_type is not None:
        typer.echo(describe(family_of(SimpleNamespace(model_type=model_type), "this model")))
    elif refused:
        for name, refusal in sorted(reasons().items()):
            typer.echo(f"{name}, {refusal.sentence}.")
    else:
        for family in families().values():
            typer.echo(describe(family))
        for wrapper in wrappers().values():
            typer.echo(wrapper.description)
