"""An answer as a page, in a file, in a notebook and from the command line."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import ifkv
from ifkv.cli import app
from ifkv.errors import InvalidInputError
from ifkv.report import Report, render_html
from ifkv.report.sentences import sentences, strongest
from ifkv.testing import tiny_model, tiny_tokenizer
from made_reports import make_report
from page_reader import Page

TOKENIZER = tiny_tokenizer()
TEXTS = ["The lamp is red. It hangs high.", "Der Tür fehlt nichts <b>.", "雨。晴れ。"]


@pytest.fixture(scope="module")
def ask() -> Callable[..., ifkv.Answer]:
    torch.manual_seed(0)
    session = ifkv.Session(tiny_model(vocab_size=len(TOKENIZER)), TOKENIZER)
    session.add(TEXTS)
    return lambda **options: session.ask("Which <lamp>?", max_new_tokens=2, **options)


# Sentences


def cut(text: str) -> list[str]:
    """Texts of a document's sentences, one token a character."""
    return [one.text for one in sentences(make_report([[], list(text)]), 0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It weighs 4.7 kg. Does it? Yes!", ["It weighs 4.7 kg.", "Does it?", "Yes!"]),
        ("Title\n\nBody.\n\n", ["Title", "Body."]),
        ('He said "no." She left', ['He said "no."', "She left"]),
        ("雨。晴れ。", ["雨。", "晴れ。"]),
        ("", []),
        ("\n\n", [""]),
    ],
)
def test_where_sentences_end(text: str, expected: list[str]) -> None:
    assert cut(text) == expected


@given(st.lists(st.text("a. \n!。x", max_size=5), max_size=12))
def test_sentences_together_are_the_document_however_it_is_cut_into_tokens(
    tokens: list[str],
) -> None:
    report = make_report([["<s>"], tokens, ["next"]])
    found = [
        slot for one in sentences(report, 0) for slot in range(one.slots.start, one.slots.stop)
    ]
    part = report.document_slices[0]
    assert found == list(range(part.start, part.stop))


def test_the_sentence_with_the_needle_is_the_strongest_and_a_sink_is_not() -> None:
    texts = ["Filler words here now. ", "The needle is right here. ", "More of the same. "]
    tokens = [list(text) for text in texts]
    scores = [1.0] * len(tokens[0]) + [8.0] * len(tokens[1]) + [1.0] * len(tokens[2])
    scores[0] = 1e6  # an attention sink
    report = make_report([[], [char for token in tokens for char in token]], scores)
    # The sink lifts the mean so far that nothing else stands out; it still counts as one token.
    assert strongest(report, 1)[0].slots.start == 0
    scores[0] = 50.0
    report = make_report([[], [char for token in tokens for char in token]], scores)
    assert strongest(report, 1)[0].text == "The needle is right here."


# The page of an answer


def test_a_page_shows_question_answer_steps_shares_and_bound(
    ask: Callable[..., ifkv.Answer], tmp_path: Path
) -> None:
    answer = ask(ratio=0.3)
    target = tmp_path / "answer.html"
    source = answer.to_html(target, titles=["one", "two", "three"])
    assert target.read_text(encoding="utf-8") == source
    page = Page(source)
    assert "".join(page.texts) == "".join(text.rstrip() for text in TEXTS)
    assert {"q1s1", "q1d1", "q1d2", "q1d3"} <= set(page.ids)
    assert all(reference[1:] in page.ids for reference in page.references)
    for words in (
        "Which &lt;lamp&gt;?",
        "recompute and prompt",
        "stitch",
        "select",
        "one",
        "three",
    ):
        assert words in source, words
    assert f"{answer.speedup_bound:.2f}×" in source
    assert "stand in the order in which they were asked" in source
    assert "script" not in page.tags


def test_a_reordered_answer_shows_both_orders(ask: Callable[..., ifkv.Answer]) -> None:
    answer = dataclasses.replace(ask(ratio=0.3), order=[2, 0, 1])
    source = answer.to_html(titles=["one", "two", "three"])
    rows = re.findall(r'class="step">(\w+)</th><td>(\d)</td><td>(\d)</td>', source)
    # Document 3 of those asked stands first: its slots are the first ones of the cache.
    assert rows == [("one", "1", "2"), ("two", "2", "3"), ("three", "3", "1")]


@pytest.mark.parametrize("ratio", [0, 1])
def test_without_scores_the_page_says_so_and_names_no_sentence(
    ask: Callable[..., ifkv.Answer], ratio: int
) -> None:
    source = ask(ratio=ratio).to_html()
    assert "Nothing was scored" in source
    assert "Sentences with the most attention" not in source


def test_a_notebook_gets_the_page_in_a_frame_that_runs_nothing(
    ask: Callable[..., ifkv.Answer],
) -> None:
    answer = ask(ratio=0.3)
    shown = answer._repr_html_()
    assert shown is not None
    frame = re.fullmatch(
        r'<iframe title="[^"]+" sandbox srcdoc="([^"]*)" style="[^"]*"></iframe>', shown
    )
    assert frame is not None
    assert html.unescape(frame[1]) == answer.to_html()
    assert len(repr(answer)) < 20_000
    assert "tokenizer" not in repr(answer)


def test_an_answer_without_a_tokenizer_says_what_to_do(ask: Callable[..., ifkv.Answer]) -> None:
    answer = dataclasses.replace(ask(ratio=0.3), tokenizer=None)
    assert answer._repr_html_() is None
    with pytest.raises(InvalidInputError, match="has no tokenizer"):
        answer.to_html()


def test_a_title_for_each_document_or_none(ask: Callable[..., ifkv.Answer]) -> None:
    with pytest.raises(InvalidInputError, match="titles has 1 entries for 3 documents"):
        ask(ratio=0.3).to_html(titles=["one"])


def test_sentences_in_the_page_lead_to_where_they_begin() -> None:
    report = Report(
        question="q",
        token_texts=["aa bb cc dd. ", "Now", " the", " needle", " here", "."],
        scores=[0.1, 9.0, 9.0, 9.0, 9.0, 9.0],
        recomputed=frozenset(),
        document_slices=[slice(0, 6)],
        prefix_length=0,
        order=[0],
    )
    source = render_html([report])
    assert '<a href="#q1s1">Now the needle here.</a>' in source
    assert re.search(r'id="q1s1" tabindex="-1"></span><span class="s\d">Now the', source)


def test_ask_writes_the_page_without_comparing_too(tmp_path: Path) -> None:
    folder = str(tmp_path / "model")
    tiny_model("qwen2", vocab_size=len(TOKENIZER)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    for name, text in (("a.md", "A lamp."), ("b.md", "A door."), ("copy.md", "A lamp.")):
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in ("a.md", "b.md", "copy.md")]
    target = tmp_path / "page.html"
    result = CliRunner().invoke(
        app,
        ["ask", "Why?", *files, "-m", folder, "--no-compare", "--html", str(target)],
    )
    assert result.exit_code == 0, result.output
    source = target.read_text(encoding="utf-8")
    assert "Why?" in source
    assert "a.md" in source
    assert "copy.md" not in source


def test_scores_of_another_selector_are_not_called_attention(
    ask: Callable[..., ifkv.Answer],
) -> None:
    assert "of the attention," in ask(ratio=0.3).to_html()
    page = ask(ratio=0.3, selector="cacheblend").to_html()
    assert "of the score," in page
    assert "of the attention" not in page
