"""``ifkv ask``: a question to a model over text files or stored documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ifkv.cli.answer_length import MaxNewTokens
from ifkv.cli.import_option import Imports, import_all
from ifkv.cli.placement import AUTO, Device, Dtype
from ifkv.cli.prompting import ChatTemplateKwargs, ControlTokens, Date, System, prompt_options
from ifkv.cli.read_files import FILES_HELP, Field
from ifkv.cli.split_option import Split
from ifkv.cli.surrogate_option import Surrogate


def ratio_of(text: str) -> float | Literal["auto"]:
    """Return a recompute ratio as written on the command line.

    Raises:
        typer.BadParameter: The text is neither ``auto`` nor a number from 0 to 1.
    """
    if text == "auto":
        return "auto"
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise typer.BadParameter(f"{text!r} is neither 'auto' nor a number from 0 to 1.")
    return ratio


def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Folder or hub id of the model.", show_default=False),
    ],
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help=f"{FILES_HELP} Without files, the question is asked over the documents in "
            "--store.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Ask over the stored documents whose title or path matches the pattern, such "
            "as 'notes/*'. May be given several times.",
            metavar="PATTERN",
            show_default=False,
        ),
    ] = None,
    retrieve: Annotated[
        int | None,
        typer.Option(
            help="Ask over at most this many documents: those whose words match the question "
            "best (BM25), the best one last.",
            min=1,
            show_default=False,
        ),
    ] = None,
    ratio: Annotated[
        Any,
        typer.Option(
            help="Recompute ratio: share of the context's tokens that is recomputed, from 0 "
            "(none, fastest) to 1 (all, equal to full prefill). 'auto' plans it for this "
            "machine, as ifkv plan does.",
            parser=ratio_of,
            metavar="RATIO|auto",
        ),
    ] = 0.15,
    reorder: Annotated[
        bool,
        typer.Option(
            "--reorder",
            help="Put the documents with the highest scores last, next to the question. If "
            "this moves documents, no KL is shown, because full prefill reads them in the "
            "given order.",
        ),
    ] = False,
    selector: Annotated[
        str,
        typer.Option(
            help="Rule that selects the tokens to recompute, with options after a colon, such "
            "as epic or cacheblend:deviation=kv."
        ),
    ] = "sink-aware",
    imports: Imports = None,
    split: Split = None,
    field: Field = "text",
    surrogate: Surrogate = None,
    system: System = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    date: Date = None,
    control_tokens: ControlTokens = "text",
    compare: Annotated[
        bool,
        typer.Option(
            help="Also answer by full prefill and by stitching without recompute, "
            "and compare times and answers. --no-compare gives one answer, streamed."
        ),
    ] = True,
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            "-s",
            help="Store of prefilled documents, a folder or a URL. Files are kept there for "
            "the next question; without files, its documents are asked over. 'memory' keeps "
            "nothing. Default: the user's cache folder.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    dtype: Dtype = AUTO,
    device: Device = AUTO,
    kv_fp8: Annotated[
        bool,
        typer.Option(
            help="Hold the request's keys and values in FP8, in half the memory of a bfloat16 "
            "cache. Answers may differ slightly."
        ),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Also write a page that shows over the text which tokens the question "
            "attends to. Its folder must exist."
        ),
    ] = None,
) -> None:
    """Ask a model a question over your files, or over a store of them.

    Files are prefilled once and kept in the store, so that the next question over them needs no
    prefill. The answer is compared with full prefill and with stitching alone, in time to first
    token and in distance (KL); --no-compare only answers.

    Example: ifkv ask "When was it built?" notes/*.md --model path/to/model

    Example: ifkv ask "When was it built?" --store documents --retrieve 5 --model path/to/model
    """
    import torch
    from rich.console import Console
    from rich.markup import escape

    from ifkv.backends.fp8 import FLOAT8, check_kv_dtype
    from ifkv.cli.compare_and_show import answer_questions, stream_answer
    from ifkv.cli.document_choice import DocumentChoice
    from ifkv.cli.generation_file import check_generation
    from ifkv.cli.interrupts import interruptible
    from ifkv.cli.load_model import check_model, load_model, load_tokenizer
    from ifkv.cli.output_paths import check_page
    from ifkv.cli.split_option import check_request
    from ifkv.cli.surrogate_option import surrogate_texts
    from ifkv.planning.support import check_plannable
    from ifkv.selectors import resolve
    from ifkv.session.options import AskOptions
    from ifkv.session.prompt_format import PromptFormat, check_question
    from ifkv.session.session import Session

    console = Console()
    with interruptible() as kept:
        # Everything that can be refused is refused before the weights are read.
        import_all(imports or [])
        rule = resolve(selector)
        if ratio == "auto":
            check_plannable(rule, reorder=reorder)
        check_question(question)
        prompt = prompt_options(system, chat_template_kwargs, date, control_tokens)
        check_page(html)
        standing_in = surrogate_texts(surrogate)
        choice = DocumentChoice(
            files or [],
            only=only,
            retrieve=retrieve,
            split=split,
            field=field,
            store=store,
            surrogate=standing_in,
        )
        checked = check_model(model, dtype=dtype, device=device)
        settings = check_generation(model, max_new_tokens)
        kv_dtype = FLOAT8 if kv_fp8 else None
        check_kv_dtype(kv_dtype, torch.device(checked.device))
        tokenizer = load_tokenizer(model)
        layout = PromptFormat(tokenizer, **prompt)

        def check_room(documents: Sequence[Sequence[int]]) -> None:
            check_request(layout, checked.config, documents, question, settings)

        choice.tokenize(layout, checked.config, check_room)
        opened = choice.open_store()

        typer.echo(checked.sentence, err=True)
        with console.status(f"loading {escape(model)}"):
            loaded = load_model(checked)
        session = Session(
            loaded,
            tokenizer,
            store=opened,
            surrogate=standing_in,
            selector=rule,
            kv_dtype=kv_dtype,
            **prompt,
        )
        session.engine.settings(AskOptions(max_new_tokens=max_new_tokens))  # a model refuses more
        kept.sentence = choice.kept_sentence(session)
        keys = choice.keys(console, session, question, check_room, say=compare)
        asked: Any = {
            "documents": keys,
            "ratio": ratio,
            "reorder": reorder,
            "selector": selector,
            "max_new_tokens": max_new_tokens,
            "html": html,
        }
        if compare:
            answer_questions(console, session, questions=[question], expected=None, **asked)
        else:
            stream_answer(console, session, question, **asked)
