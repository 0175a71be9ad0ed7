"""``ifkv eval``: compare selectors by quality and cost."""

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
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder of the results; made if it does not exist.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Folder or hub id of the model.", show_default=False),
    ] = "",
    data: Annotated[
        str,
        typer.Option(
            help="Data set: hotpotqa, squad, needle, needle-multikey, needle-multivalue or "
            "needle-chain; or a .jsonl file in LongBench's format; or the official .json file "
            "of HotpotQA or SQuAD.",
            show_default=False,
        ),
    ] = "",
    selectors: Annotated[
        list[str] | None,
        typer.Option(
            "--selectors",
            "-s",
            help="Selectors to compare, separated by commas, each with options after a colon. "
            "May be given several times. Default: all selectors.",
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
            help="More budgets than the ratios, separated by commas. Examples: number=200, "
            "mass=.5+cap=.3, .15+sentences, .15+window=5.",
            show_default=False,
        ),
    ] = "",
    geometries: Annotated[
        str,
        typer.Option(
            help="Also score in these position geometries, separated by commas, with the "
            "selectors that can: global, hl-hp, tl-tp, hl-tp.",
            show_default=False,
        ),
    ] = "",
    reorder: Annotated[
        bool,
        typer.Option(
            "--reorder",
            help="Also measure every selector with the documents of the highest scores put last.",
        ),
    ] = False,
    surrogate: Annotated[
        str,
        typer.Option(
            help="Surrogate contexts to compare, separated by commas: text files that stand before "
            "each document while it is encoded, and are dropped; default for the text that ifkv "
            "ships; files joined by + for the mean over several; none for documents encoded alone."
        ),
    ] = "none",
    limit: Annotated[
        int | None, typer.Option(help="Largest number of questions. Default: all.", min=1)
    ] = None,
    passages: Annotated[
        int | None,
        typer.Option(
            help="Passages per question; those that its answer needs are kept. "
            "Default: as the data set says.",
            min=2,
        ),
    ] = None,
    split: Annotated[
        int | None,
        typer.Option(
            help="Cut passages into documents of this many tokens. Default: one "
            "document per passage.",
            min=1,
        ),
    ] = None,
    system: System = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    date: Date = None,
    control_tokens: ControlTokens = "text",
    answers: Annotated[
        bool,
        typer.Option(
            help="Also decode answers, for token F1 and exact match. --no-answers is much faster."
        ),
    ] = True,
    max_new_tokens: Annotated[
        int, typer.Option(help="Largest number of tokens of an answer.", min=1)
    ] = DEFAULT_MAX_NEW_TOKENS,
    short_answer: Annotated[
        str | None,
        typer.Option(
            help="Sentence put after every question, so that answers are as short as the data "
            "set's and can be compared with them. Write it in the language of the questions; "
            "'' adds none. Default: an English one.",
            show_default=False,
        ),
    ] = None,
    dtype: Dtype = AUTO,
    device: Device = AUTO,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of everything random: which questions are drawn, what synthetic ones "
            "say, which other passages are added and in what order, and the resamples of the "
            "intervals. The same seed repeats a run; another seed, with another OUT, tests a "
            "finding on other questions."
        ),
    ] = 0,
    summarize_only: Annotated[
        bool,
        typer.Option(
            "--summarize-only", help="Only write the summary of the results that OUT holds."
        ),
    ] = False,
) -> None:
    """Compare selectors over many questions: distance from full prefill, and cost.

    Example: ifkv eval --model path/to/model --data needle --limit 20
    --selectors "attention-norm,attention-norm:layers=0.0-1.0,query=question,epic"
    --ratios .05,.15 --out results

    Each question is answered by full prefill, by stitching alone, and with every selector at every
    ratio. Results are written to OUT question by question: after an interruption, the same command
    continues where it stopped. More selectors, ratios or questions can be added to an existing OUT.
    The summary is written as a page with plots, as Markdown and as CSV.
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
    from ifkv.evaluation.encodings import encodings_of
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
            encodings=encodings_of([each.strip() for each in surrogate.split(",") if each.strip()]),
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
    """Return a sentence about the questions that need not be asked again."""
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
    """Print the main table and the paths of the other results."""
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
