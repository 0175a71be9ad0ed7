"""Texts cut into documents, losing nothing, in order; and what progress bars leave."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.utils import logging as bars

import ifkv
from ifkv.errors import InvalidInputError
from ifkv.session.prompt_format import PromptFormat
from ifkv.session.splitting import at_boundaries, fixed_length, pieces_of
from ifkv.store import MemoryStore
from ifkv.testing import tiny_model, tiny_tokenizer
from ifkv.utils.progress import token_bar, without_loading_bars

TOKENIZER = tiny_tokenizer()
LAYOUT = PromptFormat(TOKENIZER)
LONG, SHORT = "The lamp is red and the door is green. " * 6, "It rains."
POSITIONS = 128


def make_session() -> ifkv.Session:
    model = tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=POSITIONS)
    return ifkv.Session(model, TOKENIZER, store=MemoryStore())


@given(st.lists(st.lists(st.integers(0, 9), min_size=1), min_size=1), st.integers(1, 7))
def test_a_split_loses_no_token(documents: list[list[int]], length: int) -> None:
    pieces = fixed_length(documents, length)
    assert [t for piece in pieces for t in piece] == [t for d in documents for t in d]
    assert all(len(piece) == length for piece in pieces[:-1])
    assert 1 <= len(pieces[-1]) <= length


PARTS = [
    "a",
    "word ",
    "The lamp is red. ",
    "\n",
    "\n\n",
    "# Two\n",
    "- item\n",
    "```\n",
    "é",
    "日本",
]
PARTS += [
    "\u200b",
    "| a | b |\n",
    "\U0001f469\u200d\U0001f467",
    "\r\n",
    "\t",
    "\xa0",
    "<b>",
    "===\n",
]


@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=60).map("".join), st.integers(12, 60))
def test_pieces_are_small_enough_and_lose_white_space_only(text: str, length: int) -> None:
    assume(text.strip())
    pieces = pieces_of(LAYOUT, text, length)
    end = 0
    for number, (ids, offset, part) in enumerate(pieces, 1):
        assert len(ids) <= length
        assert part == (number, len(pieces))
        assert not text[end:offset].strip()
        # Which characters it has: those that are its ids, and the blank line behind it.
        end = next(
            stop
            for stop in range(len(text), offset, -1)
            if LAYOUT.document_ids(text[offset:stop]) == ids
        )
    assert not text[end:].strip()


MARKDOWN = """# The ferry

It leaves at two. It takes an hour.

In winter it does not run.

# The library

It opens at ten. Dogs may not come in."""


FERRY, WINTER, LIBRARY = MARKDOWN[:48], MARKDOWN[50:76], MARKDOWN[78:]
SENTENCES = [
    *("# The ferry", "It leaves at two.", "It takes an hour.", "In winter it does not", "run."),
    *("# The library", "It opens at ten.", "Dogs may not come in."),
]


@pytest.mark.parametrize(
    ("length", "pieces"),
    [
        (100, [MARKDOWN[:76], LIBRARY]),  # sections
        (60, [FERRY, WINTER, LIBRARY]),  # paragraphs
        (24, SENTENCES),  # and words, of one that is too long
    ],
)
def test_a_text_is_cut_at_the_largest_boundaries_that_fit(length: int, pieces: list[str]) -> None:
    found = at_boundaries(MARKDOWN, length, len)
    assert [piece for _, piece in found] == pieces
    assert all(MARKDOWN[offset:].startswith(piece) for offset, piece in found)


@pytest.mark.parametrize("text", ["x" * 400, "日" * 200, "a\n" * 200])
def test_a_text_without_boundaries_is_cut_all_the_same(text: str) -> None:
    pieces = at_boundaries(text, 30, len)
    assert "".join(piece for _, piece in pieces).replace("\n", "") == text.replace("\n", "")
    assert max(len(piece) for _, piece in pieces) <= 30
    assert len(pieces) < len(text) / 20


def test_a_piece_that_grows_as_it_is_cut_is_cut_again() -> None:
    # Fewer letters may be more tokens: "ab" is one here, "a" three.
    def size(text: str) -> int:
        return len(text) + 2 * (len(text) % 2)

    pieces = at_boundaries("abcdefghi", 4, size)
    assert "".join(piece for _, piece in pieces) == "abcdefghi"
    assert max(size(piece) for _, piece in pieces) <= 4


def test_a_session_cuts_long_texts_and_gives_keys_in_order() -> None:
    session = make_session()
    keys = session.add([LONG, SHORT], split=20)
    found = [session.store.get(key).token_ids.tolist() for key in dict.fromkeys(keys)]
    assert max(map(len, found)) <= 20
    texts = [TOKENIZER.decode(ids).strip() for ids in found]
    assert texts[-1] == SHORT
    assert set(" ".join(texts[:-1]).split()) == set(LONG.split())
    assert session.add([SHORT], split=20) == session.add([SHORT]) == keys[-1:]
    # One by one they are the same documents.
    made = session.prefilled
    assert [key for text in (LONG, SHORT) for key in session.add([text], split=20)] == keys
    assert session.prefilled == made


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (0, "split is 0"),
        (-3, "split is -3"),
        (1, "alone takes .* give a larger split"),
        (2.5, "2.5"),
    ],
)
def test_a_split_that_cannot_be_is_refused_before_any_work(split: Any, words: str) -> None:
    session = make_session()
    with pytest.raises(InvalidInputError, match=words):
        session.add([SHORT, LONG], split=split)
    assert not len(session.store)


def test_a_text_that_is_too_long_is_refused_with_the_way_out(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = POSITIONS
    session = ifkv.Session(make_session().model, tokenizer, store=MemoryStore())
    with caplog.at_level(logging.WARNING), pytest.raises(InvalidInputError, match=r"split=512"):
        session.add([SHORT, LONG], progress=True)
    assert not caplog.records, "transformers warned of a length that ifkv refuses or cuts"
    assert not capsys.readouterr().err, "a bar was left by what was refused before any work"
    with pytest.raises(InvalidInputError, match="split is 0"):
        session.add([LONG], split=0)
    assert len(session.add([SHORT, LONG], split=30)) > 2


def test_a_bar_shows_that_time_goes_by(capsys: pytest.CaptureFixture[str]) -> None:
    with token_bar("prefilling") as report:
        assert report is not None
        report(0, 7)
        report(7, 7)
    shown = capsys.readouterr().err
    assert "7/7 tokens 0:00:0" in " ".join(shown.split())


def test_a_bar_in_a_notebook_needs_no_widgets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with token_bar("prefilling") as report:
            assert report is not None
            assert not capsys.readouterr().err, "a bar before any work"
            report(2, 7)
            report(7, 7)
    shown = capsys.readouterr()
    assert "prefilling: 100%" in shown.err
    assert "7/7" in shown.err
    assert not shown.out


def test_transformers_bars_come_back() -> None:
    assert bars.is_progress_bar_enabled()
    hidden = are_progress_bars_disabled()
    with without_loading_bars():
        assert not bars.is_progress_bar_enabled()
        assert are_progress_bars_disabled() == hidden, "a download would not be seen"
    assert bars.is_progress_bar_enabled()
    assert are_progress_bars_disabled() == hidden
