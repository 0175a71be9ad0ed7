"""Texts cut into documents: on token ids, losing none, in order; and what progress bars leave."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import logging as bars

import ifkv
from ifkv.errors import InvalidInputError
from ifkv.progress import token_bar, without_loading_bars
from ifkv.splitting import at_most, fixed_length
from ifkv.store import MemoryStore
from ifkv.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
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


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 50))
def test_pieces_are_few_and_as_equal_as_can_be(document: list[int], length: int) -> None:
    pieces = at_most(document, length)
    assert [token for piece in pieces for token in piece] == document
    assert max(map(len, pieces)) <= length
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    assert (len(pieces) - 1) * length < len(document)


def test_a_session_cuts_long_texts_and_gives_keys_in_order() -> None:
    session = make_session()
    keys = session.add([LONG, SHORT], split=20)
    whole = [session.format.document_ids(text) for text in (LONG, SHORT)]
    found = [session.store.get(key).token_ids for key in keys]
    pieces = -(-len(whole[0]) // 20)
    assert len(keys) == pieces + 1
    assert torch.cat(found[:pieces]).tolist() == whole[0]
    assert found[pieces].tolist() == whole[1]
    # One by one they are the same documents.
    made = session.prefilled
    assert [key for text in (LONG, SHORT) for key in session.add([text], split=20)] == keys
    assert session.prefilled == made


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
