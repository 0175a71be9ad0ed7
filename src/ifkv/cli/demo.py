"""``ifkv demo``: answers of a small real model over cached documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ifkv.cli.answer_length import MaxNewTokens
from ifkv.cli.surrogate_option import Surrogate


def demo(
    ratio: Annotated[
        float,
        typer.Option(
            help="Recompute ratio: share of the context's tokens that is recomputed.", min=0, max=1
        ),
    ] = 0.15,
    questions: Annotated[int, typer.Option(help="Number of questions to ask.", min=1, max=6)] = 3,
    reorder: Annotated[
        bool,
        typer.Option(
            "--reorder",
            help="Put the documents with the highest scores last, next to the question. If "
            "this moves documents, no KL is shown, because full prefill reads them in the "
            "given order.",
        ),
    ] = False,
    surrogate: Surrogate = None,
    max_new_tokens: MaxNewTokens = None,
    html: Annotated[
        Path,
        typer.Option(help="Page that shows over the text which tokens the questions attend to."),
    ] = Path("ifkv-demo.html"),
) -> None:
    """Prefill a dozen passages once, then answer questions over them in three ways.

    A small real model (SmolLM2-135M, from an installed package, on the CPU) answers each question
    three times: by full prefill, from stitched documents without recompute, and by ifkv. The table
    shows time to first token, speed-up, its share of the arithmetic bound S(r), and distance from
    full prefill (KL). The text below it shows which tokens the question attends to and which were
    recomputed.

    Example: ifkv demo --questions 1 --ratio 0.3
    """
    from rich.console import Console

    from ifkv.cli.compare_and_show import add_documents, answer_questions
    from ifkv.cli.output_paths import check_page
    from ifkv.cli.surrogate_option import surrogate_texts
    from ifkv.demo.corpus import load_corpus
    from ifkv.demo.model import MODEL_NAME, load_demo_model, prepare_demo_model
    from ifkv.session.session import Session
    from ifkv.store import MemoryStore

    check_page(html)
    standing_in = surrogate_texts(surrogate)
    console = Console()
    prepare_demo_model()  # the first time it converts the model, and shows that by itself
    with console.status(f"loading {MODEL_NAME}"):
        model, tokenizer = load_demo_model()
    corpus = load_corpus()
    # Every run shows the whole way: nothing is kept.
    session = Session(model, tokenizer, store=MemoryStore(), surrogate=standing_in)
    titles = [passage.title for passage in corpus.passages]
    keys = add_documents(console, session, [passage.text for passage in corpus.passages], titles)
    answer_questions(
        console,
        session,
        documents=keys,
        questions=[question.text for question in corpus.questions[:questions]],
        expected=[question.answer for question in corpus.questions[:questions]],
        ratio=ratio,
        reorder=reorder,
        max_new_tokens=max_new_tokens,
        html=html,
    )
