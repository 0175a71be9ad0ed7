"""The heat map and the table on a terminal."""

from __future__ import annotations

import re

import pytest

from ifkv.report import AnswerRow, Heatmap, Report, comparison_table
from ifkv.report.table import nats, seconds, times
from made_reports import make_hostile_report, make_report, printed


@pytest.fixture(name="hostile")
def hostile_report() -> Report:
    return make_hostile_report()


def test_the_heat_map_shades_and_underlines(hostile: Report) -> None:
    shown = printed(Heatmap(hostile), colour=True)
    # 4: underline; 48;2: a background colour. " red" is both, and its space is neither.
    assert re.search(r"is \x1b\[4;[\d;]*48;2;[\d;]*mred\x1b\[0m", shown)
    assert "1 · Lamp" in shown
    assert "1 of 4 tokens recomputed" in shown


def test_without_colours_a_line_of_marks_stands_below() -> None:
    report = make_report([[], ["漢字", " is", " red"]], recomputed=frozenset({0, 2}), titles=["t"])
    lines = printed(Heatmap(report), width=40).splitlines()
    at = next(index for index, line in enumerate(lines) if "漢字 is red" in line)
    # A wide character takes two columns, and so do its marks.
    assert lines[at + 1].strip("│ ").rstrip() == "‾‾‾‾    ‾‾‾"


def test_the_compact_heat_map_keeps_the_richest_and_says_what_it_left_out() -> None:
    words = [[f"w{i} " * 8 + "\n"] for i in range(9)]
    rich = [["plain"], [text for part in words for text in part], ["dull"]]
    scores = [0.0] + [1.0] * 9 + [0.1]
    scores[1 + 4] = 9.0
    report = make_report([[], *rich], scores)
    shown = printed(Heatmap(report, documents=1, lines=1))
    assert "w4 w4" in shown
    assert "w3 w3" not in shown
    assert shown.count("⋯") == 2
    assert "2 more documents with 1% of the attention" in shown
    everything = printed(Heatmap(report))
    assert "⋯" not in everything
    assert "plain" in everything
    assert "w8 w8" in everything


@pytest.mark.parametrize("width", [24, 40, 200])
def test_the_heat_map_fits_any_terminal(width: int) -> None:
    report = make_report([[], ["Lorem", " ipsum"] * 100], recomputed=frozenset(range(0, 200, 3)))
    assert max(map(len, printed(Heatmap(report, lines=5), width=width).splitlines())) <= width


def test_escape_sequences_of_a_document_do_not_reach_the_terminal() -> None:
    report = make_report(
        [[], ["\x1b]0;title\x07", "\x1b[2J", "[red]x[/red]"]],
        question="\x1b[2Jq",
        titles=["\x1b[2Jt"],
        rows=[AnswerRow("\x1b[2Jw", 1.0, "\x1b[2Ja")],
    )
    shown = printed(Heatmap(report)) + printed(comparison_table(report.rows, title="\x1b[2J"))
    assert "\x1b" not in shown
    assert "[red]x[/red]" in shown


def test_the_table_shows_each_way(hostile: Report) -> None:
    shown = printed(comparison_table(hostile.rows, title="Why?"), width=100)
    assert shown.startswith("Why?")
    row = next(line for line in shown.splitlines() if "ifkv <r>" in line)
    assert row.split()[2:] == ["500", "ms", "4.00×", "80%", "3e-07", "line", "⏎", "break"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (seconds(0.2651), "265 ms"),
        (seconds(0.9996), "1.00 s"),
        (times(None), "–"),
        (times(4.126), "4.13×"),
        (times(39.51), "39.5×"),
        (times(129.4), "129×"),
        (nats(None), "–"),
        (nats(0.0), "0.0000"),
        (nats(0.0431), "0.0431"),
        (nats(-2e-9), "-2e-09"),
    ],
)
def test_numbers_are_short(text: str, expected: str) -> None:
    assert text == expected
