"""``ifkv verify``: do the laws hold on your model?"""

from __future__ import annotations

from typing import Annotated

import typer

from ifkv.cli.placement import AUTO, Device, Dtype


def verify(
    model_path: Annotated[
        str, typer.Argument(help="Folder or hub id of a Llama, Qwen, Mistral or Phi-3 model.")
    ],
    dtype: Dtype = AUTO,
    length: Annotated[int, typer.Option(help="Tokens of each test document.", min=8)] = 48,
    device: Device = AUTO,
) -> None:
    """Check the method's laws on your own model, and print the errors that were measured.

    Random tokens run through the model natively and through ifkv: recomputing everything must equal
    full prefill, untouched slots must keep their bits, and so on. Exits with 1 if a law is broken.

    Example: ifkv verify path/to/model
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ifkv.cli.load_model import check_model, load_model
    from ifkv.cli.wording import count
    from ifkv.testing.verify import verify as check

    console = Console()
    checked = check_model(model_path, dtype=dtype, device=device)
    typer.echo(checked.sentence, err=True)
    with console.status(f"loading {escape(model_path)}"):
        model = load_model(checked)
    title = escape(f"{model_path}, {checked.dtype}, {checked.device}")
    table = Table("law", "error", "allowed", "", title=title)
    broken = 0
    with console.status("checking") as status:
        for result in check(model, length=length):
            broken += not result.holds
            allowed = f"{result.tolerance:.1e}" if result.tolerance else "same bits"
            mark = "[green]holds[/]" if result.holds else "[bold red]BROKEN[/]"
            table.add_row(result.law, f"{result.error:.1e}", allowed, mark)
            status.update(f"checked: {result.law}")
    console.print(table)
    if broken:
        verb = "does" if broken == 1 else "do"
        console.print(f"[bold red]{count(broken, 'law')} {verb} not hold on this model.[/]")
        raise typer.Exit(1)
    console.print("[green]All laws hold on this model.[/]")
