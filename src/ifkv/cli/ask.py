"""``ifkv ask``: your model, your text files, your question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ifkv.cli.importing import Imports, import_all


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
    files: Annotated[list[Path], typer.Argument(help="Text or Markdown files, one document each.")],
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
        bool, typer.Option("--reorder", help="Put the documents that matter most last.")
    ] = False,
    selector: Annotated[
        str,
        typer.Option(
            help="What chooses the tokens to recompute, such as epic or cacheblend:deviation=kv."
        ),
    ] = "attention-norm",
    imports: Imports = None,
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
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer.", min=1)] = 64,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="For example cpu or cuda.")] = "cpu",
    kv_fp8: Annotated[bool, typer.Option(help="Keep the question's cache in 8 bits.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page here that shows the attention norms over the text."),
    ] = None,
) -> None:
    """Ask your own model a question over your own files.

    Example: ifkv ask "When was it built?" notes/*.md --model path/to/model
    """
    from rich.console import Console
    from rich.markup import escape

    from ifkv.auto import check_plannable
    from ifkv.cli.asking import answer_questions, stream_answer, titles_of
    from ifkv.cli.loading import load_model, load_tokenizer, read_texts
    from ifkv.float8 import FLOAT8
    from ifkv.selectors import resolve
    from ifkv.session import Session
    from ifkv.store import MemoryStore

    import_all(imports or [])
    rule = resolve(selector)  # refuse a bad one before the model is loaded
    if ratio == "auto":
        check_plannable(rule, reorder=reorder)
    console = Console()
    texts = read_texts(files)
    tokenizer = load_tokenizer(model)
    with console.status(f"loading {escape(model)}"):
        loaded = load_model(model, dtype=dtype, device=device)
    session = Session(
        loaded,
        tokenizer,
        store=MemoryStore() if store == "memory" else store,
        kv_dtype=FLOAT8 if kv_fp8 else None,
    )
    if not compare:
        keys = session.add(texts, progress=True)
        stream_answer(
            console,
            session,
            question,
            ratio=ratio,
            reorder=reorder,
            selector=selector,
            max_new_tokens=max_new_tokens,
            titles=titles_of(keys, [file.name for file in files]),
            html=html,
        )
        return
    answer_questions(
        console,
        session,
        texts=texts,
        titles=[file.name for file in files],
        questions=[question],
        expected=None,
        ratio=ratio,
        reorder=reorder,
        selector=selector,
        max_new_tokens=max_new_tokens,
        html=html,
    )
