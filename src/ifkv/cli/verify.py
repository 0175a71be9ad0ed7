"""``ifkv verify``: check the method's properties on your model."""

from __future__ import annotations

from typing import Annotated

import typer

from ifkv.cli.placement import AUTO, Device, Dtype


def verify(
    model_path: Annotated[
        str,
        typer.Argument(help="Folder or hub id of a model of a type that `ifkv families` lists."),
    ],
    dtype: Dtype = AUTO,
    length: Annotated[
        int, typer.Option(help="Approximate tokens of each test document.", min=8)
    ] = 48,
    device: Device = AUTO,
) -> None:
    """Check on your own model that the method is exact where it promises to be.

    Random tokens run through the model's own forward and through ifkv. Recomputing everything must
    equal full prefill, slots that were not selected must keep their bits, and so on. The table
    shows the largest error of each property beside the error that is allowed. Exits with 1 if a
    property does not hold.

    Example: ifkv verify path/to/model
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ifkv.cli.load_model import check_model, load_model
    from ifkv.testing.verify import verify as check

    console = Console()
    checked = check_model(model_path, dtype=dtype, device=device)
    typer.echo(checked.sentence, err=True)
    with console.status(f"loading {escape(model_path)}"):
        model = load_model(checked)
    title = escape(f"{model_path}, {checked.dtype}, {checked.device}")
    table = Table("property", "error", "allowed", "", title=title)
    broken = 0
    with console.status("checking") as status:
        for result in check(model, length=length):
            broken += not result.holds
            allowed = f"{result.tolerance:.1e}" if result.tolerance else "same bits"
            mark = "[green]holds[/]" if result.holds else "[bold red]BROKEN[/]"
            table.add_row(result.name, f"{result.error:.1e}", allowed, mark)
            status.update(f"checked: {result.name}")
    console.print(table)
    if broken:
        found = "1 property does" if broken == 1 else f"{broken} properties do"
        console.print(f"[bold red]{found} not hold on this model.[/]")
        raise typer.Exit(1)
    console.print("[green]All properties hold on this model.[/]")
