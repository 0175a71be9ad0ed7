"""Figure of the keys that each token has attended to: encoded alone, stitched, repaired."""

from __future__ import annotations

from figures.canvas import Canvas

PREFIX, DOCUMENTS, PROMPT = 2, (5, 5, 5), 2
REPAIRED = (8, 10, 14)  # slots of the selected tokens
CELL = 11


def _segments() -> list[int]:
    """Return a number per slot: 0 in the prefix, 1, 2, ... in documents, the next in the prompt."""
    found = [0] * PREFIX
    for number, length in enumerate((*DOCUMENTS, PROMPT), 1):
        found += [number] * length
    return found


def _panel(canvas: Canvas, x: float, y: float, title: str, note: str, *, stage: int) -> None:
    segments = _segments()
    prompt = segments[-1]
    canvas.text(x, y - 34, title, bold=True, size=15)
    canvas.text(x, y - 16, note, size=12, fill="soft")
    for row, own in enumerate(segments):
        if own == prompt and stage == 0:
            continue
        for column in range(len(segments)):
            if column > row:
                continue
            encoded = segments[column] in (0, own) and own != prompt
            if own == prompt or (stage == 2 and row in REPAIRED):
                fill = "new"
            elif encoded:
                fill = "old"
            else:
                fill = "none"
            canvas.rect(x + column * CELL, y + row * CELL, CELL - 1.5, CELL - 1.5, fill)
        if stage == 2 and row in REPAIRED:
            # Marked by a sign too, for readers who cannot tell the colours apart.
            canvas.text(x - 5, y + row * CELL + 9, "▸", size=11, anchor="end", fill="mark")


def draw() -> str:
    """Draw the three stages side by side."""
    canvas = Canvas(
        784,
        400,
        "Three triangles of which token sees which key. Encoded alone: each document sees the "
        "prefix and itself. Stitched: the prompt sees everything, documents still only themselves. "
        "Repaired: three selected tokens see everything before them.",
    )
    y = 78
    _panel(canvas, 24, y, "Encoded alone", "block-diagonal, once per document", stage=0)
    _panel(canvas, 272, y, "Stitched", "only the prompt sees everything", stage=1)
    _panel(canvas, 548, y, "Repaired", "selected rows (▸) see, too", stage=2)
    side = y + len(_segments()) * CELL
    canvas.text(24, side + 20, "rows: tokens; columns: keys", size=12, fill="soft")
    labels = (
        ("old", "seen when the document was encoded"),
        ("new", "seen when the question came"),
        ("none", "never seen: what makes the cache wrong"),
    )
    for index, (fill, label) in enumerate(labels):
        at = side + 38 + index * 22
        canvas.rect(24, at, 14, 14, fill, stroke="line")
        canvas.text(46, at + 12, label, size=12)
    return canvas.render()
