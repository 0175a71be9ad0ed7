"""``ifkv encode``: build a store of prefilled documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ifkv.cli.load_model import check_model, load_model, load_tokenizer
from ifkv.cli.placement import AUTO, DTYPE_HELP, Device
from ifkv.cli.prompting import ChatTemplateKwargs, ControlTokens, Date, System, prompt_options
from ifkv.cli.read_files import FILES_HELP, Field
from ifkv.cli.split_option import Split
from ifkv.cli.store import parse_bytes
from ifkv.cli.surrogate_option import Surrogate


def encode(
    files: Annotated[
        list[Path],
        typer.Argument(help=FILES_HELP),
    ],
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Folder or hub id of the model.", show_default=False),
    ],
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            "-s",
            help="Store to write to, a folder or a URL. Default: the user's cache folder.",
        ),
    ] = None,
    split: Split = None,
    field: Field = "text",
    surrogate: Surrogate = None,
    system: System = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    date: Date = None,
    control_tokens: ControlTokens = "text",
    dtype: Annotated[
        str,
        typer.Option(
            help=f"{DTYPE_HELP} Ask questions in the same dtype: documents of another are not "
            "found."
        ),
    ] = AUTO,
    device: Device = AUTO,
    codec: Annotated[
        str,
        typer.Option(
            help="Storage format of keys and values: exact; or fp8 or int8, rounded to 8 bits "
            "a number, a quarter of float32's size."
        ),
    ] = "exact",
    max_bytes: Annotated[
        str | None,
        typer.Option(
            help="Largest size of a store in a folder, such as 20GiB. Beyond it, the least "
            "recently used documents are evicted. Default: no limit."
        ),
    ] = None,
    sensitivities: Annotated[
        bool,
        typer.Option(
            "--sensitivities",
            help="Also store the sensitivities that the selector sensitivity-aware needs: how "
            "far each token's values change after other text. This takes another prefill of "
            "each document, and encodes stored documents without sensitivities again.",
        ),
    ] = False,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens that are computed at once; a longer document is computed alone. Give "
            "fewer if memory runs out, more on a large GPU. Default: 1024 on a CPU, 4096 "
            "elsewhere.",
            min=1,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Prefill files into a store; documents that are stored already are skipped.

    Example: ifkv encode notes/*.md corpus.jsonl --model path/to/model --store documents
    """
    from rich.console import Console
    from rich.markup import escape

    from ifkv.cli.interrupts import documents_kept, interruptible
    from ifkv.cli.read_files import read_corpus
    from ifkv.cli.split_option import cut
    from ifkv.cli.surrogate_option import surrogate_texts
    from ifkv.cli.wording import count
    from ifkv.documents.token_ids import no_padding
    from ifkv.patching.handle import patch
    from ifkv.session.prompt_format import PromptFormat
    from ifkv.session.text_documents import surrogate_of_texts
    from ifkv.store import encode_documents, keeper_of, open_store
    from ifkv.utils.progress import token_bar

    with interruptible() as kept:
        # Everything that can be refused is refused before the weights are read.
        budget = None if max_bytes is None else parse_bytes(max_bytes)
        prompt = prompt_options(system, chat_template_kwargs, date, control_tokens)
        texts = read_corpus(files, field)
        standing_in = surrogate_texts(surrogate)
        checked = check_model(model, dtype=dtype, device=device)
        layout = PromptFormat(load_tokenizer(model), **prompt)
        cut_documents = cut(layout, checked.config, texts, split, standing_in)
        documents = [each.ids for each in cut_documents]
        prefix = layout.prefix_ids()
        opened = open_store(store, max_bytes=budget, codec=codec)

        typer.echo(checked.sentence, err=True)
        with Console(stderr=True).status(f"loading {escape(model)}"):
            loaded = load_model(checked)
        with patch(loaded):
            context = surrogate_of_texts(loaded, layout, prefix, standing_in)
            kept.sentence = documents_kept(opened, loaded, documents, prefix, context)
            with token_bar("encoding") as report:
                result = encode_documents(
                    loaded,
                    opened,
                    documents,
                    attention_mask=no_padding(documents),
                    names=[each.name for each in cut_documents],
                    prefix=prefix,
                    surrogate=context,
                    batch_tokens=batch_tokens,
                    sensitivities=sensitivities,
                    on_progress=report,
                )
        if (keeper := keeper_of(opened)) is not None:
            origins = [each.source for each in cut_documents]
            keeper.add_sources(list(zip(result.keys, origins, strict=True)))
    typer.echo(
        f"{count(len(documents), 'document')}: {result.made} encoded, {result.present} already "
        f"there, {len(documents) - result.made - result.present} given twice"
    )
    evicted = sum(key not in opened for key in set(result.keys))
    if evicted:
        typer.echo(
            f"{evicted} of them have been evicted again: all together do not fit into the store's "
            "budget. Raise --max-bytes, or name a --store on a larger disk.",
            err=True,
        )
