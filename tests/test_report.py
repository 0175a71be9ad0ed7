"""Reports: exact token texts, shades, the page, the heat map and the table."""

from __future__ import annotations

import dataclasses
import io
import re
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import ifkv
from ifkv.errors import InvalidInputError
from ifkv.report import (
    AnswerRow,
    Heatmap,
    Report,
    comparison_table,
    render_html,
    token_pieces,
    write_html,
)
from ifkv.report.shading import LEVELS, document_shares, richest, runs, visible
from ifkv.report.table import nats, seconds, times
from ifkv.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class TidyTokenizer:
    """Decodes words like a tokenizer that removes the space before a comma afterwards."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(("one", ",", "two", "don", "'t")[i] for i in ids).replace(" ,", ",")


class StrippingTokenizer:
    """Decodes like sentencepiece: every word has a space before it, the first one loses it."""

    def decode(self, ids: list[int]) -> str:
        return "".join((" a", " b", "c", "é")[i] for i in ids).removeprefix(" ")


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


# The page


class Page(HTMLParser):
    """Checks that tags nest, and collects the documents' texts, ids and references."""

    VOID = frozenset({"meta", "br", "input"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.recomputed = ""
        self.tags: set[str] = set()
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        if "id" in found:
            self.ids.append(found["id"] or "")
        self.references += [value or "" for name, value in attrs if name in ("href", "src")]
        if found.get("class") == "text":
            self.texts.append("")
        if tag not in self.VOID:
            self.open.append("text" if found.get("class") == "text" else tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() in (tag, "text"), tag

    def handle_data(self, data: str) -> None:
        if "text" in self.open:
            self.texts[-1] += data
            if "u" in self.open:
                self.recomputed += data


HOSTILE = "</u></div><script>alert(1)</script>&amp;\"'"


@pytest.fixture
def hostile() -> Report:
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


def test_the_page_holds_the_text_and_the_marks_and_no_one_elses_markup(hostile: Report) -> None:
    source = render_html([hostile, hostile], note=HOSTILE)
    page = Page(source)
    assert page.texts == ["Lamp is red.", f"{HOSTILE} tail"] * 2
    assert page.recomputed == f"red{HOSTILE}" * 2
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    for word in ("2.00 s", "500 ms", "4.00×", "5.00×", "80%", "3e-07", "ifkv &lt;r&gt;"):
        assert word in source, word


def test_the_page_needs_nothing_else_and_can_be_read_by_all(hostile: Report) -> None:
    source = render_html([hostile])
    page = Page(source)
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert "http" not in source
    assert "url(" not in source
    assert "@import" not in source
    assert '<html lang="en">' in source
    assert "width=device-width" in source
    assert "prefers-color-scheme: dark" in source
    assert page.tags >= {"main", "h1", "h2", "h3", "table", "th", "details", "summary", "u"}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_shades_and_marks_have_contrast(hostile: Report, theme: str) -> None:
    css = re.findall(r"--([\w]+): (#[0-9a-f]{6})", render_html([hostile]))
    half = len(css) // 2
    colours = dict(css[:half] if theme == "light" else css[half:])

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(colours[a]), luminance(colours[b])))
        return (high + 0.05) / (low + 0.05)

    # WCAG 2: 4.5 for text. Each shade is told from the one before it, and grows away from the card.
    assert contrast("ink", "page") > 7
    assert contrast("soft", "page") > 4.5
    assert all(contrast("on", f"s{level}") > 4.5 for level in range(1, LEVELS))
    # 3 for what is drawn: the underline on every shade, and the bars on their track.
    assert all(contrast("mark", under) > 3 for under in ("card", "s1", "s2", "s3", "s4", "s5"))
    steps = [contrast("card", f"s{level}") for level in range(1, LEVELS)]
    assert steps == sorted(steps)


def test_eight_thousand_tokens_stay_light_and_quick() -> None:
    words = [f" word{i % 97}" for i in range(8192)]
    scores = [1.0 + (i * 7919 % 1000) ** 3 / 1e8 for i in range(8192)]
    report = make_report([[], words], scores, frozenset(range(0, 8192, 7)))
    start = time.perf_counter()
    page = render_html([report])
    assert time.perf_counter() - start < 5
    assert len(page) < 600_000


def test_no_reports_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least one"):
        render_html([])


def test_a_page_is_written_whole_or_not_at_all(
    hostile: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "new" / "page.html"
    assert write_html(target, [hostile]) == target
    assert target.read_text(encoding="utf-8") == render_html([hostile])
    before = target.read_text(encoding="utf-8")
    monkeypatch.setattr("ifkv.report.html.os.replace", lambda *_: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        write_html(target, [hostile], title="another")
    assert target.read_text(encoding="utf-8") == before
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]


# The terminal


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
