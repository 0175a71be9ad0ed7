"""``ifkv eval``: which way of choosing tokens answers best, at what cost."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ifkv.cli.import_option import Imports, import_all
from ifkv.cli.placement import AUTO, Device, Dtype
from ifkv.cli.prompting import ChatTemplateKwargs, ControlTokens, Date, System, prompt_options
from ifkv.generation.default_length import DEFAULT_MAX_NEW_TOKENS

if TYPE_CHECKING:
    from rich.console import Console

    from ifkv.evaluation.summary import Summary


def evaluate(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the results.", show_default=False)
    ],
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Folder or hub id of the model.", show_default=False),
    ] = "",
    data: Annotated[
        str,
        typer.Option(
            help="hotpotqa, squad, needle, needle-multikey, needle-multivalue, needle-chain; or a "
            ".jsonl in LongBench's format; or the official .json of HotpotQA or SQuAD.",
            show_default=False,
        ),
    ] = "",
    selectors: Annotated[
        list[str] | None,
        typer.Option(
            "--selectors",
            "-s",
            help="Selectors by name, with options behind a colon, separated by commas; may be "
            "given several times. All that there are by default.",
            show_default=False,
        ),
    ] = None,
    imports: Imports = None,
    ratios: Annotated[
        str, typer.Option(help="Recompute ratios, separated by commas.")
    ] = ".05,.10,.15,.30",
    budgets: Annotated[
        str,
        typer.Option(
            help="Further budgets, separated by commas: number=200, mass=.5+cap=.3, "
            ".15+sentences, .15+window=5.",
            show_default=False,
        ),
    ] = "",
    geometries: Annotated[
        str,
        typer.Option(
            help="Also score in these geometries, where a selector can: global, hl-hp, tl-tp, "
            "hl-tp.",
            show_default=False,
        ),
    ] = "",
    reorder: Annotated[
        bool, typer.Option("--reorder", help="Also with the richest documents put last.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Questions at most.", min=1)] = None,
    passages: Annotated[
        int | None,
        typer.Option(help="Passages a question; those its answer needs stay.", min=2),
    ] = None,
    split: Annotated[
        int | None,
        typer.Option(help="Cut passages into documents of so many tokens.", min=1),
    ] = None,
    system: System = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    date: Date = None,
    control_tokens: ControlTokens = "text",
    answers: Annotated[
        bool, typer.Option(help="Decode answers too, for F1 and exact match.")
    ] = True,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens of an answer at most.", min=1)
    ] = DEFAULT_MAX_NEW_TOKENS,
    short_answer: Annotated[
        str | None,
        typer.Option(
            help="A sentence put behind every question, so that answers are as short as the data "
            "set's and can be compared with them; an English one if not given. Write it in the "
            "questions' language, or give '' where the data asks for whole sentences.",
            show_default=False,
        ),
    ] = None,
    dtype: Dtype = AUTO,
    device: Device = AUTO,
    seed: Annotated[
        int,
        typer.Option(
            help="Any number: it decides which questions are drawn, what made-up ones say, which "
            "passages stand beside the needed ones and in what order, and the intervals' "
            "resamples. The same seed gives the same run; take another, and another OUT, to see "
            "whether a finding holds on other questions."
        ),
    ] = 0,
    summarize_only: Annotated[
        bool,
        typer.Option("--summarize-only", help="Only write the summary of what OUT holds already."),
    ] = False,
) -> None:
    """Compare selectors over many questions: quality against full prefill, and cost.

    Example: ifkv eval --model path/to/model --data needle --limit 20
    --selectors "attention-norm,attention-norm:layers=0.0-1.0,query=question,epic"
    --ratios .05,.15 --out results

    Each question is answered by full prefill, by stitching alone, and with every selector at every
    ratio. Results go to OUT one question at a time: after an interruption the same command goes
    on where it stopped, and more selectors, ratios or questions are added to what is there. The
    summary is written as a page with plots, Markdown and CSV.
    """
    from rich.console import Console

    from ifkv.errors import InvalidInputError
    from ifkv.evaluation.publishing import publish
    from ifkv.evaluation.results_log import Ledger

    console = Console()
    if summarize_only:
        summary, written = publish(Ledger(out), seed=seed)
        _show(console, summary, written)
        return
    # Everything that can be refused is refused before the weights are read.
    for value, option in ((model, "--model"), (data, "--data")):
        if not value:
            raise InvalidInputError(f"{option} is missing; give it, or use --summarize-only.")

    from ifkv.cli.interrupts import interruptible
    from ifkv.cli.load_model import check_model, load_model, load_tokenizer
    from ifkv.cli.output_paths import check_results
    from ifkv.cli.placement import check_dtype
    from ifkv.cli.wording import count
    from ifkv.evaluation import Bench, draw, load, matrix, run, settings_of
    from ifkv.evaluation.budgets import parse_budgets
    from ifkv.evaluation.progress import ways_bar
    from ifkv.evaluation.results_log import LOCK, only_run
    from ifkv.evaluation.specs import numbers, split_specs
    from ifkv.selectors import names
    from ifkv.session.prompt_format import PromptFormat

    with interruptible() as kept:
        import_all(imports or [])
        wanted = [spec for text in selectors or names() for spec in split_specs(text)]
        ways = matrix(
            wanted,
            numbers(ratios) if ratios.strip() or not budgets.strip() else [],
            geometries=[name.strip() for name in geometries.split(",") if name.strip()],
            reorder=reorder,
            budgets=parse_budgets(budgets),
        )
        prompt = prompt_options(system, chat_template_kwargs, date, control_tokens)
        check_dtype(dtype)
        check_results(out)
        if (out / LOCK).exists():
            with only_run(out):  # refused here if there is another run, which may end meanwhile
                pass
        dataset = load(data, seed=seed)
        questions = draw(dataset, limit=limit, passages=passages, seed=seed)
        checked = check_model(model, dtype=dtype, device=device)
        tokenizer = load_tokenizer(model)
        PromptFormat(tokenizer, **prompt)  # refuses what the chat template cannot do
        typer.echo(checked.sentence, err=True)
        with console.status("loading the model"):
            loaded = load_model(checked)
        bench = Bench(loaded, tokenizer, split=split, max_new_tokens=max_new_tokens, layout=prompt)
        if short_answer is not None:
            bench.short_answer = short_answer
        settings = settings_of(bench, dataset, seed=seed, passages=passages)
        console.print(
            f"{count(len(questions), 'question')}, {count(len(ways), 'way')} of answering each, "
            f"into {out}",
            markup=False,
            soft_wrap=True,
        )
        keys, ids = [way.key for way in ways], [question.id for question in questions]
        kept.sentence = lambda: _finished(out, ids, keys, answers=answers)
        with ways_bar(len(questions) * len(ways)) as advance:
            done = run(
                bench, questions, ways, out, settings=settings, answers=answers, advance=advance
            )
    for question, failure in done.failures.items():
        console.print(f"not answered: {question}: {failure}", style="red", markup=False)
    if done.seconds:
        median = statistics.median(done.seconds)
        console.print(
            f"{count(len(done.seconds), 'question')} asked now, {median:.1f} s each in the median."
        )
    summary, written = publish(done.ledger, seed=seed)
    _show(console, summary, written)
    if done.failures:
        raise typer.Exit(1)


def _finished(out: Path, questions: list[str], ways: list[str], *, answers: bool) -> str:
    """How many questions need not be asked again, in a sentence."""
    from ifkv.cli.wording import count
    from ifkv.evaluation.results_log import SETTINGS, Ledger

    found = 0
    if (out / SETTINGS).exists():  # not yet, if it was interrupted before the first question
        ledger = Ledger(out)
        found = sum(not ledger.missing(each, ways, answers=answers) for each in questions)
    return (
        f"{out} holds {found} of {count(len(questions), 'question')}; the same command goes on "
        "from there."
    )


def _show(console: Console, summary: Summary, written: list[Path]) -> None:
    """The main table in the terminal, and where the rest is."""
    from rich.table import Table

    from ifkv.cli.output_paths import say_written
    from ifkv.cli.wording import count
    from ifkv.evaluation.tables import quality_table

    heads, cells = quality_table(summary.rows, brief=True)
    table = Table(title=count(summary.count, "question"))
    for head in heads:
        table.add_column(head, overflow="fold")
    for line in cells:
        table.add_row(*(cell.replace("[", "\\[") for cell in line))
    console.print(table)
    for path in written:
        say_written(console, path)
