"""The page of a report: whole, closed to markup in documents, readable by all."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from ifkv.errors import InvalidInputError
from ifkv.report import Report, render_html, write_html
from ifkv.report.shading import LEVELS
from made_reports import HOSTILE, make_hostile_report, make_report
from page_reader import Page


@pytest.fixture(name="hostile")
def hostile_report() -> Report:
    return make_hostile_report()


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
