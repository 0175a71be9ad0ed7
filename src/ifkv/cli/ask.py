"""``ifkv ask``: your model, your text files, your question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ifkv.cli.answer_length import MaxNewTokens
from ifkv.cli.cutting import Split
from ifkv.cli.importing import Imports, import_all
from ifkv.cli.placement import AUTO, Device, Dtype
from ifkv.cli.prompting import ChatTemplateKwargs, ControlTokens, Date, System, prompt_options
from ifkv.cli.reading import FILES_HELP, Field


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
    files: Annotated[
        list[Path],
        typer.Argument(help=FILES_HELP),
    ],
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Folder or hub id of the model.", show_default=False),
    ],
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
            help="Where prefilled files are kept for the next question: a folder or URL, or "
            "'memory' to keep nothing; the user's cache folder if not given.",
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
    """Ask your own model a question over your own files.

    Example: ifkv ask "When was it built?" notes/*.md --model path/to/model
    """
    import torch
    from rich.console import Console
    from rich.markup import escape

    from ifkv.cli.asking import answer_questions, stream_answer, titles_of
    from ifkv.cli.cutting import check_request, cut
    from ifkv.cli.generation_file import check_generation
    from ifkv.cli.interrupting import documents_kept, interruptible
    from ifkv.cli.loading import check_model, load_model, load_tokenizer
    from ifkv.cli.places import check_page
    from ifkv.cli.reading import read_corpus
    from ifkv.float8 import FLOAT8, check_kv_dtype
    from ifkv.plannable import check_plannable
    from ifkv.selectors import resolve
    from ifkv.session import Session
    from ifkv.store import MemoryStore, session_store
    from ifkv.text import PromptFormat, check_question

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
        found = read_corpus(files, field)
        checked = check_model(model, dtype=dtype, device=device)
        settings = check_generation(model, max_new_tokens)
        kv_dtype = FLOAT8 if kv_fp8 else None
        check_kv_dtype(kv_dtype, torch.device(checked.device))
        tokenizer = load_tokenizer(model)
        layout = PromptFormat(tokenizer, **prompt)
        documents = cut(layout, checked.config, found, split)
        check_request(layout, checked.config, documents, question)
        context = len(layout.prefix_ids()) + sum(map(len, {tuple(ids) for _, ids in documents}))
        settings.new_tokens(context, len(layout.prompt_ids(question)))  # refuses a lack of room
        opened = MemoryStore() if store == "memory" else session_store(store)

        typer.echo(checked.sentence, err=True)
        with console.status(f"loading {escape(model)}"):
            loaded = load_model(checked)
        session = Session(
            loaded, tokenizer, store=opened, selector=rule, kv_dtype=kv_dtype, **prompt
        )
        if store == "memory":
            kept.sentence = lambda: "With --store memory nothing is kept."
        else:
            token_ids = [ids for _, ids in documents]
            kept.sentence = documents_kept(opened, loaded, token_ids, session.prefix_ids)
        texts = [text for _, text in found]
        titles = [Path(where).name for where, _ in documents]
        if compare:
            answer_questions(
                console,
                session,
                texts=texts,
                split=split,
                titles=titles,
                questions=[question],
                expected=None,
                ratio=ratio,
                reorder=reorder,
                selector=selector,
                max_new_tokens=max_new_tokens,
                html=html,
            )
            return
        keys = session.add(texts, split=split, progress=True)
        stream_answer(
            console,
            session,
            question,
            ratio=ratio,
            reorder=reorder,
            selector=selector,
            max_new_tokens=max_new_tokens,
            titles=titles_of(keys, titles),
            html=html,
        )
