"""Reports for the tests of what is drawn of them."""

from __future__ import annotations

import io

from rich.console import Console

from ifkv.report import AnswerRow, Report


def make_report(
    texts: list[list[str]],
    scores: list[float] | None = None,
    recomputed: frozenset[int] = frozenset(),
    **fields: object,
) -> Report:
    """A report over a prefix and documents, each given by its tokens' texts."""
    slices, start = [], len(texts[0])
    for document in texts[1:]:
        slices.append(slice(start, start + len(document)))
        start += len(document)
    given_fields = {
        "question": "Which?",
        "token_texts": [text for part in texts for text in part],
        "scores": [1.0] * start if scores is None else scores,
        "recomputed": recomputed,
        "document_slices": slices,
        "prefix_length": len(texts[0]),
        "order": list(range(len(slices))),
    }
    return Report(**{**given_fields, **fields})  # type: ignore[arg-type]


def printed(renderable: object, *, width: int = 80, colour: bool = False) -> str:
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=colour,
        color_system="truecolor" if colour else None,
    )
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


HOSTILE = "</u></div><script>alert(1)</script>&amp;\"'"


def make_hostile_report() -> Report:
    """A report whose texts would break a page or a terminal that trusts them."""
    texts = [["<s>"], ["Lamp", " is", " red", "."], [HOSTILE, " tail"]]
    rows = [
        AnswerRow("full prefill", 2.0, HOSTILE, speedup=1.0, kl=0.0),
        AnswerRow("ifkv <r>", 0.5, "line\nbreak", speedup=4.0, bound=5.0, kl=3e-7),
    ]
    return make_report(
        texts,
        [9.0, 0.1, 0.1, 3.0, 0.1, 2.0, 0.1],
        frozenset({3, 5}),
        question=f"Why? {HOSTILE}",
        titles=["Lamp", HOSTILE],
        rows=rows,
    )
