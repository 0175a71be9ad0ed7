"""One answer as a page, and that page inside another."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ifkv.errors import InvalidInputError
from ifkv.report.data import Report
from ifkv.report.html import render_html

if TYPE_CHECKING:
    from ifkv.session.answer import Answer


def answer_page(answer: Answer, titles: Sequence[str] = ()) -> str:
    """Render one answer; see [ifkv.Answer.to_html][].

    Raises:
        InvalidInputError: The answer has no tokenizer, or there is not one title per document.
    """
    if answer.tokenizer is None:
        raise InvalidInputError(
            "this answer has no tokenizer, so its tokens cannot be shown as text; answers of "
            "Session.ask have one. Set it: dataclasses.replace(answer, tokenizer=tokenizer)."
        )
    if titles and len(titles) != len(answer.order):
        raise InvalidInputError(
            f"titles has {len(titles)} entries for {len(answer.order)} documents; give one for "
            "each, in the order they were asked."
        )
    report = Report.from_answer(answer.tokenizer, answer.question, answer, titles=titles)
    return render_html([report], title="Where the question looks")


def framed(page: str, *, height: str = "36rem") -> str:
    """A page in a frame that runs nothing and whose style stays inside."""
    return (
        f'<iframe title="Where the question looks" sandbox srcdoc="{html.escape(page)}" '
        f'style="width:100%;height:{height};border:1px solid #8888;border-radius:.5rem"></iframe>'
    )
