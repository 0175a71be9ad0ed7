"""Reports: exact token texts, what a report refuses, and its shades."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ifkv
from ifkv.errors import InvalidInputError
from ifkv.report import AnswerRow, Report, render_html, token_pieces
from ifkv.report.shading import LEVELS, document_shares, richest, runs, visible
from ifkv.testing import tiny_model, tiny_tokenizer
from made_reports import make_report

TOKENIZER = tiny_tokenizer()


class TidyTokenizer:
    """Decodes words like a tokenizer that removes the space before a comma afterwards."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(("one", ",", "two", "don", "'t")[i] for i in ids).replace(" ,", ",")


class StrippingTokenizer:
    """Decodes like sentencepiece: every word has a space before it, the first one loses it."""

    def decode(self, ids: list[int]) -> str:
        return "".join((" a", " b", "c", "é")[i] for i in ids).removeprefix(" ")


# token_pieces


@given(st.text(max_size=60))
def test_pieces_are_the_text_whatever_the_characters(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    pieces = token_pieces(TOKENIZER, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=60))
def test_pieces_are_the_text_of_any_ids_broken_characters_included(ids: list[int]) -> None:
    pieces = token_pieces(TOKENIZER, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)


@pytest.mark.parametrize("tokenizer", [TidyTokenizer(), StrippingTokenizer()])
@given(ids=st.lists(st.integers(0, 3), max_size=20))
def test_pieces_are_the_text_of_tokenizers_that_look_at_neighbours(
    tokenizer: object, ids: list[int]
) -> None:
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids)  # type: ignore[attr-defined]


def test_a_character_of_several_tokens_belongs_to_the_last() -> None:
    ids = TOKENIZER("a漢b", add_special_tokens=False).input_ids
    assert token_pieces(TOKENIZER, ids) == ["a", "", "", "漢", "b"]


# Report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1.0]}, "scores"),
        ({"titles": ["a", "b", "c"]}, "titles has 3 entries for 2"),
        ({"order": [0]}, "order"),
        ({"document_slices": [slice(1, 3), slice(2, 4)]}, "begin at slot 3"),
        ({"document_slices": [slice(0, 3)], "order": [0]}, "begin at slot 1"),
        ({"document_slices": [slice(1, 5)], "order": [0]}, "end at slot 5"),
        ({"recomputed": frozenset({4})}, "outside"),
    ],
)
def test_a_report_that_does_not_add_up_is_refused(change: dict[str, object], message: str) -> None:
    report = make_report([["<s>"], ["a"], ["b", "c"]])
    with pytest.raises(InvalidInputError, match=message):
        dataclasses.replace(report, **change)  # type: ignore[arg-type]


def test_share_of_the_bound() -> None:
    assert AnswerRow("w", 1.0, "", speedup=4.0, bound=5.0).share_of_bound == pytest.approx(0.8)
    assert AnswerRow("w", 1.0, "", speedup=4.0).share_of_bound is None
    assert AnswerRow("w", 1.0, "", bound=5.0).share_of_bound is None


def test_a_sessions_answer_becomes_a_report_in_the_caches_order() -> None:
    torch.manual_seed(0)
    session = ifkv.Session(tiny_model(vocab_size=len(TOKENIZER)), TOKENIZER)
    texts = ["The lamp is red — très.", "Der Tür fehlt nichts.", "雨"]
    session.add(texts)
    answer = session.ask("Which lamp?", ratio=0.3, reorder=True, max_new_tokens=2)
    report = Report.from_answer(TOKENIZER, "Which lamp?", answer, titles=["a", "b", "c"])
    assert report.titles == ["abc"[index] for index in answer.order]
    assert report.recomputed == set(answer.slots.tolist())
    for index, part in zip(answer.order, report.document_slices, strict=True):
        assert "".join(report.token_texts[part]).strip() == texts[index]
    # Nothing to score where all or nothing is recomputed: the report is flat, and still renders.
    for ratio in (0.0, 1.0):
        answer = session.ask("Which lamp?", ratio=ratio, max_new_tokens=1)
        assert render_html([Report.from_answer(TOKENIZER, "Which lamp?", answer)])


# Shading

pieces_lists = st.lists(
    st.tuples(
        st.sampled_from(["", " a", "b", "\n", " ", "<i>", "é", "\x1b[31m", "漢"]),
        st.floats(0, 1e3),
        st.booleans(),
    ),
    min_size=1,
    max_size=30,
)


@given(pieces_lists)
def test_runs_together_are_the_text_and_neighbours_differ(
    tokens: list[tuple[str, float, bool]],
) -> None:
    report = make_report(
        [[], [text for text, _, _ in tokens]],
        [score for _, score, _ in tokens],
        frozenset(slot for slot, (_, _, mark) in enumerate(tokens) if mark),
    )
    found = runs(report, report.document_slices[0])
    assert "".join(run.text for run in found) == "".join(text for text, _, _ in tokens)
    looks = [(run.level, run.recomputed) for run in found]
    assert all(a != b for a, b in pairwise(looks))
    assert all(run.text and 0 <= run.level < LEVELS for run in found)


def test_shades_go_by_the_ratio_to_the_documents_mean() -> None:
    # The prefix is a sink a thousand times larger and does not count; the documents' mean is 1.
    scores = [1000.0, 0.1, 0.7, 0.2, 3.0]
    report = make_report([["<s>"], ["a", "b"], ["c", "d"]], scores)
    levels = [run.level for part in report.document_slices for run in runs(report, part)]
    assert levels == [0, 1, 0, 3]


def test_a_words_shade_begins_at_the_word() -> None:
    report = make_report([[], ["one", " two", " three"]], [0.0, 3.0, 0.0])
    assert [(run.text, run.level) for run in runs(report, slice(0, 3))] == [
        ("one ", 0),
        ("two", 3),
        (" three", 0),
    ]


def test_a_recomputed_part_of_a_character_is_seen() -> None:
    report = make_report([[], ["", "é", "x"]], recomputed=frozenset({0}))
    assert [(run.text, run.recomputed) for run in runs(report, slice(0, 3))] == [
        ("é", True),
        ("x", False),
    ]


def test_documents_share_the_attention_and_keep_their_numbers() -> None:
    report = make_report(
        [["<s>"], ["a"], ["b", "c"]], [9.0, 3.0, 0.5, 0.5], frozenset({2}), order=[1, 0]
    )
    shares = document_shares(report)
    assert [share.mass for share in shares] == [0.75, 0.25]
    assert [share.number for share in shares] == [2, 1]
    assert [share.recomputed for share in shares] == [0, 1]
    assert richest(shares, 1) == [0]
    assert document_shares(make_report([[], ["a"], ["b"]], [0.0, 0.0]))[0].mass == 0


def test_no_control_character_passes() -> None:
    assert visible("a\x1b[31m\x07\r\nb\tc\x9b\ud800") == "a�[31m�\nb    c��"
