"""Figure of the four position geometries: the positions of documents while they are scored."""

from __future__ import annotations

from figures.canvas import Canvas

PREFIX, DOCUMENTS, QUERY = 3, (9, 14, 6), 5
TOTAL = PREFIX + sum(DOCUMENTS)
UNIT = 12.5


def _layouts() -> list[tuple[str, str, list[int], int]]:
    """Return name, description, first position of each document and of the query."""
    starts, at = [], PREFIX
    for length in DOCUMENTS:
        starts.append(at)
        at += length
    right = [TOTAL - length for length in DOCUMENTS]
    left = [PREFIX] * len(DOCUMENTS)
    return [
        ("global", "as in the joined text", starts, TOTAL),
        ("hl-hp", "all after the prefix, query behind the longest", left, PREFIX + max(DOCUMENTS)),
        ("tl-tp", "all before the query, at the end", right, TOTAL),
        ("hl-tp", "all after the prefix, query at the end", left, TOTAL),
    ]


def draw() -> str:
    """Draw one band per geometry over a common axis of positions."""
    canvas = Canvas(
        720,
        524,
        "Positions of prefix, three documents and query under the geometries global, hl-hp, tl-tp "
        "and hl-tp.",
    )
    left, y = 132, 24
    for name, words, starts, query in _layouts():
        canvas.text(20, y + 16, name, bold=True, size=15)
        canvas.text(left, y + 14, words, size=12, fill="soft")
        top = y + 24
        canvas.rect(left, top, PREFIX * UNIT - 2, 66, "prefix")
        canvas.text(left + 8, top + 38, "P", size=12)
        for number, (start, length) in enumerate(zip(starts, DOCUMENTS, strict=True)):
            x = left + start * UNIT
            canvas.rect(x, top + 23 * number, length * UNIT - 2, 20, "old")
            canvas.text(x + 6, top + 23 * number + 15, f"doc {number + 1}", size=12)
        canvas.rect(left + query * UNIT, top, QUERY * UNIT - 2, 66, "new")
        canvas.text(left + query * UNIT + 8, top + 38, "query", size=12)
        y += 114
    canvas.line(left, y + 6, left + (TOTAL + QUERY) * UNIT, y + 6, stroke="soft")
    for label, at in (("0", 0), ("P", PREFIX), ("T", TOTAL)):
        canvas.line(left + at * UNIT, y + 2, left + at * UNIT, y + 10, stroke="soft")
        canvas.text(left + at * UNIT, y + 26, label, size=12, anchor="middle", fill="soft")
    canvas.text(20, y + 10, "position", size=12, fill="soft")
    return canvas.render()
