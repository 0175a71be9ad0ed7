"""The page of an evaluation: what it draws, where, and that it needs nothing else."""

import dataclasses
import html.parser
import itertools
import math
import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ifkv.evaluation.bootstrap import Estimate
from ifkv.evaluation.chart import Chart, Line, Point, ticks
from ifkv.evaluation.page import render
from ifkv.evaluation.summary_rows import FULL, Row
from ifkv.evaluation.tables import quality_table
from ifkv.evaluation.ways import STITCH_ONLY


def sure(value: float) -> Estimate:
    return Estimate(value, value - 0.1, value + 0.1, 9)


def row(way: str, ratio: float, flops: float, gap: float, **further: Any) -> Row:
    made = Row(
        way=way,
        ratio=ratio,
        count=9,
        rows=ratio,
        flops=flops,
        selecting=0.05,
        gap=sure(gap),
        nll_gap=sure(gap),
        kl=sure(1 - gap),
        top1=sure(gap),
        nll=sure(1.0),
        f1=None,
        em=None,
        budget=f"{ratio:g}",
    )
    return dataclasses.replace(made, **further)


ROWS = [
    row(FULL, 1.0, 1.0, 1.0),
    row(STITCH_ONLY, 0.0, 0.02, 0.0),
    row("epic", 0.1, 0.2, 0.4),
    row("epic", 0.3, 0.4, 0.7),
    row("oracle:layers=0.0-1.0 +reorder", 0.1, 1.3, 0.9, selecting=1.1),
    row("<b>&", 0.1, 0.25, 0.5),
]


class Elements(html.parser.HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]


def page_of(rows: list[Row]) -> str:
    return render("T", rows, [("All", "*n*", *quality_table(rows))], {"seed": 0, "split": None})


def test_a_page_needs_nothing_else_and_escapes_what_is_put_into_it() -> None:
    page = page_of(ROWS)
    elements = Elements(page)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in elements.found}
    assert not re.search(r"https?:|url\(|@import|\bsrc=", page)
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;" in page


def test_every_way_is_in_the_legend_once_and_drawn_where_it_was_measured() -> None:
    page = page_of(ROWS)
    elements = Elements(page)
    assert len(elements.of("li")) == 3
    assert len([one for one in elements.of("svg") if one.get("class") == "plot"]) == 2
    assert "Token F1" not in page, "nobody decoded answers"
    answered = [dataclasses.replace(one, f1=sure(0.5), em=sure(0.4)) for one in ROWS]
    assert len([o for o in Elements(page_of(answered)).of("svg") if o.get("class") == "plot"]) == 4
    # Three ways, four points, in both plots; the legend's three markers besides.
    assert len(elements.of("path")) == 2 * 4 + 3
    assert "epic, r = 0.3: 70 % [60, 80] at 0.400 of full prefill" in page
    assert "at 0.200 of full prefill's operations".replace("'", "&#39;") in page, "the oracle's"


def test_rows_over_different_questions_say_so() -> None:
    rows = [*ROWS, row("recency", 0.1, 0.2, 0.1, count=3)]
    assert "Not every way was asked every question" in page_of(rows)
    assert "Not every way was asked every question" not in page_of(ROWS)
    heads, cells = quality_table(rows)
    assert heads[2] == "n"
    assert [line[2] for line in cells] == ["9"] * 6 + ["3"]


def test_what_is_not_a_number_is_not_drawn() -> None:
    nan = Estimate(math.nan, math.nan, math.nan, 9)
    rows = [dataclasses.replace(one, gap=nan) for one in ROWS]
    page = page_of(rows)
    assert "Share of the KL gap recovered" not in page, "nothing to recover"
    assert "KL to full prefill" in page
    assert not re.search(r"\bnan\b", page)
    unsure = [dataclasses.replace(one, kl=Estimate(0.1, math.nan, math.nan, 1)) for one in ROWS]
    assert not re.search(r'="nan"', page_of(unsure))
    assert 'class="bar"' in page
    assert len(Elements(page_of(unsure)).of("polyline")) == 2 * 3 + 3


NUMBERS = st.floats(0.001, 50, allow_nan=False)


@given(st.lists(st.tuples(NUMBERS, st.floats(-30, 30)), min_size=1, max_size=16))
def test_higher_is_further_up_and_letters_do_not_lie_on_each_other(
    places: list[tuple[float, float]],
) -> None:
    lines = [Line(n, str(n), [Point(x, y, y, y, "")]) for n, (x, y) in enumerate(places)]
    chart = Chart("t", "h", lines, [(FULL, 1.0), (STITCH_ONLY, 0.0)])
    for (x1, y1), (x2, y2) in itertools.combinations(places, 2):
        assert (chart.x(x1) <= chart.x(x2)) == (x1 <= x2) or chart.x(x1) == chart.x(x2)
        assert (chart.y(y1) >= chart.y(y2)) == (y1 <= y2) or chart.y(y1) == chart.y(y2)
    assert len(chart.ends) == len(lines)
    for (_, x1, y1), (_, x2, y2) in itertools.combinations(chart.ends, 2):
        assert abs(x1 - x2) > 12 or abs(y1 - y2) > 12


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_ticks_are_few_evenly_spaced_and_within(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert 2 <= len(found) <= 6
    assert low - 1e-6 * width <= found[0] and found[-1] <= low + width + 1e-6 * width  # noqa: PT018
    steps = [later - sooner for sooner, later in itertools.pairwise(found)]
    assert max(steps) - min(steps) < 1e-6 * max(steps)


def test_no_two_lines_look_the_same_and_letters_go_on_behind_z() -> None:
    lines = [Line(number, "", []) for number in range(120)]
    assert len({(line.style, line.marker) for line in lines}) == 120
    assert [lines[n].letter for n in (0, 25, 26, 51, 52)] == ["A", "Z", "AA", "AZ", "BA"]
