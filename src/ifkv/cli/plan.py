"""``ifkv plan``: predicted times to first token, and a recommended recompute ratio."""

from __future__ import annotations

from typing import Annotated

import typer

from ifkv.cli.placement import AUTO, Device, Dtype


def plan(
    model: Annotated[
        str,
        typer.Argument(help="Folder or hub id of the model; only its config is read, no weights."),
    ],
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens",
            "-n",
            help="Tokens of the context: of all documents together.",
            min=1,
            show_default=False,
        ),
    ],
    documents: Annotated[
        int,
        typer.Option(
            help="Number of documents, as many as your retriever returns per question; they "
            "count as equally long. It matters if there are few (the first is not "
            "recomputed) or very many (each takes a moment to load and stitch).",
            min=1,
        ),
    ] = 8,
    query: Annotated[
        int, typer.Option(help="Tokens of the prompt: the question in its chat template.", min=1)
    ] = 32,
    question: Annotated[
        int,
        typer.Option(help="Tokens of the bare question, for selectors that score by it.", min=1),
    ] = 16,
    selector: Annotated[
        str,
        typer.Option(
            help="Selector of the tokens: sink-aware, sensitivity-aware, value-aware or "
            "attention-norm, with options after a colon."
        ),
    ] = "sink-aware",
    ratio: Annotated[
        list[float] | None,
        typer.Option(
            help="Recompute ratio to consider. May be given several times. Default: 0.05, "
            "0.15 and 0.3.",
            min=0,
            max=1,
            show_default=False,
        ),
    ] = None,
    speedup: Annotated[
        float,
        typer.Option(
            help="Wanted speed-up to the first token over full prefill; the largest ratio "
            "predicted to reach it is recommended. A higher value gives faster answers that "
            "are further from full prefill's; 1 gives the nearest answers that are not slower."
        ),
    ] = 2.0,
    behind_surrogate: Annotated[
        bool,
        typer.Option(
            "--behind-surrogate",
            help="The documents are encoded behind a surrogate context (--surrogate of ifkv "
            "encode), so that the first one, too, is recomputed in part.",
        ),
    ] = False,
    dtype: Dtype = AUTO,
    device: Device = AUTO,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Measure this machine again.")
    ] = False,
) -> None:
    """Predict times to first token on this machine, and recommend a recompute ratio.

    The first run measures how fast this machine runs layers of the model's shape, with random
    weights. That takes ten to fifteen seconds, and the rates are kept. Do not run other work
    meanwhile: plans from rates that look like those of a busy machine say so.

    Times are given for three places of the documents' keys and values. hot: in memory. warm: in a
    store on disk, and in the system's page cache. cold: in a store on disk only.

    Example: ifkv plan path/to/model --tokens 4000 --documents 12 --ratio 0.1 --ratio 0.2
    """
    import warnings
    from pathlib import Path

    import torch
    from rich.console import Console
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    from ifkv.cli.load_model import load_config
    from ifkv.cli.placement import check_dtype, chosen_device, chosen_dtype
    from ifkv.errors import CalibrationWarning
    from ifkv.models.families import family_of
    from ifkv.planning.planner import RATIOS, planner_for
    from ifkv.planning.support import check_plannable, check_request
    from ifkv.selectors import resolve

    check_dtype(dtype)
    rule = check_plannable(resolve(selector))
    console = Console()
    config = load_config(model)
    device = chosen_device(device)
    dtype = chosen_dtype(dtype, config, device)
    # Everything that can be refused is refused before the machine is measured.
    family_of(config, model)
    check_request(
        tokens,
        documents=documents,
        prompt=query,
        question=question,
        ratios=ratio or RATIOS,
        speedup=speedup,
        positions=config.max_position_embeddings,
    )
    with console.status("measuring this machine"):
        planner = planner_for(
            config, dtype=getattr(torch, dtype), device=device, recalibrate=recalibrate
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # printed below the table
        made = planner.plan(
            tokens,
            documents=documents,
            prompt=query,
            question=question,
            ratios=ratio or RATIOS,
            selector=rule,
            speedup=speedup,
            first_exact=not behind_surrogate,
        )
    name = Path(model).resolve().name if Path(model).is_dir() else model
    table = Table(
        title=escape(f"{name}, {dtype}, {device}, {torch.get_num_threads()} threads"),
        caption="Predicted times to first token; how many times faster hot is than full prefill, "
        "and S(r), the bound on that.",
    )
    for heading in ("", "tokens", "hot", "warm", "cold", "speed-up", "bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in made.forecasts:
        table.add_row(
            f"r = {each.ratio:g}",
            str(each.rows),
            *(_seconds(time) for time in (each.hot, each.warm, each.cold)),
            f"{made.prefill / each.hot:.2f}×",
            f"{each.bound:.2f}×",
            style="bold" if each.ratio == made.ratio else None,
        )
    table.add_row("full prefill", str(tokens), _seconds(made.prefill), style="dim")
    console.print(table)
    console.print(
        f"{tokens} tokens in {documents} documents, and a prompt of {query}. Their keys "
        f"and values take {decimal(made.kv_bytes)}. Rates measured on {planner.rates.date}."
    )
    if made.doubt is not None:
        console.print(f"[yellow]{escape(made.doubt[0].upper() + made.doubt[1:])}[/]")
    advice = "full prefill" if made.ratio is None else f"r = {made.ratio:g}"
    console.print(f"[green]Recommended: {advice}[/] ({made.reason}).")


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "not measured"
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
