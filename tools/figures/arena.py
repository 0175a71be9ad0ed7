"""Figure of what each selector recovers over its cost, from benchmarks/results."""

from __future__ import annotations

import itertools

from arena_tables import SETTINGS, rows_of

from figures.canvas import Canvas

# Colour and width of each line. ifkv's own selectors stand out.
LINES = {
    "sensitivity-aware": ("mark", 2.6),
    "sink-aware": ("new", 2.6),
    "attention-norm": ("ink", 1.4),
    "prophetkv": ("soft", 1.4),
    "cacheblend": ("old", 1.8),
    "epic": ("line", 1.8),
}
COLUMNS = 2
WIDE, HIGH = 250, 230  # size of a panel; the margins around it:
LEFT, TOP, NAMES, BELOW = 62, 88, 156, 76
COSTS = (0.0, 0.4)
TICK, LINE_HEIGHT = 0.1, 14
Point = tuple[float, float]


def draw() -> str:
    """Draw one panel per model and data set, with a line per selector over its ratios."""
    canvas = Canvas(
        LEFT + COLUMNS * (WIDE + NAMES) - 20,
        TOP + -(-len(SETTINGS) // COLUMNS) * (HIGH + BELOW) - 16,
        "Share of the gap between stitching alone and full prefill that each selector recovers, "
        "over its operations to the first token as a share of full prefill's.",
    )
    canvas.text(20, 28, "What a selector recovers, and what it costs", bold=True, size=15)
    canvas.text(
        20,
        48,
        "higher: closer to full prefill; further left: fewer operations; squares: ratios",
        size=12,
        fill="soft",
    )
    for number, (name, title) in enumerate(SETTINGS.items()):
        row, column = divmod(number, COLUMNS)
        left, top = LEFT + column * (WIDE + NAMES), TOP + row * (HIGH + BELOW)
        _panel(canvas, left, top, title, points_of(name))
    return canvas.render()


def points_of(file: str) -> dict[str, list[Point]]:
    """Return each way's points (cost, share of the gap) over all questions, sorted by cost."""
    found: dict[str, list[Point]] = {}
    for row in rows_of(file):
        if row["way"] in LINES:
            found.setdefault(row["way"], []).append((float(row["flops"]), float(row["gap"])))
    return {way: sorted(points) for way, points in found.items()}


def _panel(
    canvas: Canvas, left: float, top: float, title: str, ways: dict[str, list[Point]]
) -> None:
    def x(cost: float) -> float:
        return left + (cost - COSTS[0]) / (COSTS[1] - COSTS[0]) * WIDE

    def y(gap: float) -> float:
        return top + (1 - gap) * HIGH

    canvas.text(left, top - 12, title, size=13, bold=True)
    for tick in range(5):
        canvas.line(left, y(tick / 4), left + WIDE, y(tick / 4))
        canvas.text(left - 6, y(tick / 4) + 4, f"{25 * tick} %", size=11, anchor="end", fill="soft")
        canvas.text(
            x(tick * TICK), top + HIGH + 18, f"{tick * TICK:.1f}", size=11, anchor="middle",
            fill="soft",
        )  # fmt: skip
    canvas.text(
        left + WIDE / 2, top + HIGH + 38, "operations, as a share of full prefill's", size=12,
        anchor="middle", fill="soft",
    )  # fmt: skip
    for way in reversed(LINES):  # ifkv's own last, on top
        colour, width = LINES[way]
        points = ways.get(way, [])
        for (x1, y1), (x2, y2) in itertools.pairwise(points):
            canvas.line(x(x1), y(y1), x(x2), y(y2), stroke=colour, width=width)
        for cost, gap in points:
            canvas.rect(x(cost) - 3, y(gap) - 3, 6, 6, colour)
    ends = sorted((y(points[-1][1]), way) for way, points in ways.items())
    lowest = 0.0
    for end, way in ends:  # names in the order of the lines' ends, without overlap
        lowest = max(end + 4, lowest + LINE_HEIGHT)
        canvas.rect(left + WIDE + 2, lowest - 9, 8, 8, LINES[way][0])
        canvas.text(left + WIDE + 14, lowest, way, size=11)
