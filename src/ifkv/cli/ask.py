"""``ifkv ask``: your model, your text files, your question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ifkv.cli.answer_length import MaxNewTokens
from ifkv.cli.import_option import Imports, import_all
from ifkv.cli.placement import AUTO, Device, Dtype
from ifkv.cli.prompting import ChatTemplateKwargs, ControlTokens, Date, System, prompt_options
from ifkv.cli.read_files import FILES_HELP, Field
from ifkv.cli.split_option import Split
from ifkv.errors import InvalidInputError


def ratio_of(text: str) -> float | Literal["auto"]:
    """A recompute ratio as written on the command line.

    Raises:
        typer.BadParameter: It is neither ``auto`` nor a number from 0 to 1.
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
            help=f"{FILES_HELP} Without any, the question is asked over what is in --store.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Of what is in --store, ask over documents whose title or path matches, such as "
            "'notes/*'; may be given several times.",
            metavar="PATTERN",
            show_default=False,
        ),
    ] = None,
    retrieve: Annotated[
        int | None,
        typer.Option(
            help="Ask over so many documents at most: those whose words fit the question best, "
            "by BM25, the best last.",
            min=1,
            show_default=False,
        ),
    ] = None,
    ratio: Annotated[
        Any,
        typer.Option(
            help="Recompute ratio: share of the context recomputed, 0 to 1; 'auto' measures this "
            "machine and plans it, as ifkv plan does.",
            parser=ratio_of,
            metavar="RATIO|auto",
        ),
    ] = 0.15,
    reorder: Annotated[
        bool,
        typer.Option(
            "--reorder",
            help="Put the documents that matter most last. Where that moves them, no KL to full "
            "prefill is shown, which reads them in the order given.",
        ),
    ] = False,
    selector: Annotated[
        str,
        typer.Option(
            help="What chooses the tokens to recompute, such as epic or cacheblend:deviation=kv."
        ),
    ] = "sink-aware",
    imports: Imports = None,
    split: Split = None,
    field: Field = "text",
    system: System = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    date: Date = None,
    control_tokens: ControlTokens = "text",
    compare: Annotated[
        bool,
        typer.Option(help="Answer by full prefill and by stitching alone, too, and compare."),
    ] = True,
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            "-s",
            help="Where prefilled files are kept for the next question, and where documents are "
            "found if no files are given: a folder or URL, or 'memory' to keep nothing; the user's "
            "cache folder if not given.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    dtype: Dtype = AUTO,
    device: Device = AUTO,
    kv_fp8: Annotated[bool, typer.Option(help="Keep the question's cache in 8 bits.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Also write a page to this file, in a folder that is there, that shows, "
            "over the text, where the question looked."
        ),
    ] = None,
) -> None:
    """Ask your own model a question over your own files, or over a store of them.

    Example: ifkv ask "When was it built?" notes/*.md --model path/to/model

    Example: ifkv ask "When was it built?" --store documents --retrieve 5 --model path/to/model
    """
    import torch
    from rich.console import Console
    from rich.markup import escape

    from ifkv.backends.fp8 import FLOAT8, check_kv_dtype
    from ifkv.cli.compare_and_show import (
        add_documents,
        answer_questions,
        say_documents,
        stream_answer,
    )
    from ifkv.cli.generation_file import check_generation
    from ifkv.cli.interrupts import documents_kept, interruptible
    from ifkv.cli.load_model import check_model, load_model, load_tokenizer
    from ifkv.cli.output_paths import check_page, check_store
    from ifkv.cli.read_files import read_corpus
    from ifkv.cli.split_option import check_request, cut
    from ifkv.planning.support import check_plannable
    from ifkv.selectors import resolve
    from ifkv.session.options import AskOptions
    from ifkv.session.prompt_format import PromptFormat, check_question
    from ifkv.session.retrieval import load_bm25s
    from ifkv.session.session import Session
    from ifkv.store import MemoryStore, session_store

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
        if files:
            if only:
                raise InvalidInputError(
                    f"--only {only[0]} names documents of a store, and files were given, too; "
                    "leave one of them out."
                )
        elif split is not None:
            raise InvalidInputError(
                f"--split {split} cuts files, and none was given; documents of a store stay as "
                "they were encoded."
            )
        else:
            check_store(store)
        if retrieve is not None:
            load_bm25s()
        found = read_corpus(files or [], field)
        checked = check_model(model, dtype=dtype, device=device)
        settings = check_generation(model, max_new_tokens)
        kv_dtype = FLOAT8 if kv_fp8 else None
        check_kv_dtype(kv_dtype, torch.device(checked.device))
        tokenizer = load_tokenizer(model)
        layout = PromptFormat(tokenizer, **prompt)
        documents = cut(layout, checked.config, found, split)
        token_ids = [document.ids for document in documents]
        if files and retrieve is None:
            check_request(layout, checked.config, token_ids, question, settings)
        opened = MemoryStore() if store == "memory" else session_store(store)

        typer.echo(checked.sentence, err=True)
        with console.status(f"loading {escape(model)}"):
            loaded = load_model(checked)
        session = Session(
            loaded, tokenizer, store=opened, selector=rule, kv_dtype=kv_dtype, **prompt
        )
        session.engine.settings(AskOptions(max_new_tokens=max_new_tokens))  # a model refuses more
        if not files:
            kept.sentence = lambda: "The store is as it was."
        elif store == "memory":
            kept.sentence = lambda: "With --store memory nothing is kept."
        else:
            kept.sentence = documents_kept(opened, loaded, token_ids, session.prefix_ids)
        if files:
            texts, sources = [text for _, text in found], [source for source, _ in found]
            keys = add_documents(console, session, texts, sources, split=split, say=compare)
        else:
            keys = session.stored(only)
        if retrieve is not None:
            keys = session.retrieve(question, retrieve, documents=keys)
        if retrieve is not None or not files:
            prefix = len(session.prefix_ids)
            asked = [session.context_ids([key])[prefix:].tolist() for key in keys]
            check_request(layout, checked.config, asked, question, settings)
            say_documents(console, session, keys)
        if compare:
            answer_questions(
                console,
                session,
                documents=keys,
                questions=[question],
                expected=None,
                ratio=ratio,
                reorder=reorder,
                selector=selector,
                max_new_tokens=max_new_tokens,
                html=html,
            )
            return
        stream_answer(
            console,
            session,
            question,
            documents=keys,
            ratio=ratio,
            reorder=reorder,
            selector=selector,
            max_new_tokens=max_new_tokens,
            html=html,
        )
