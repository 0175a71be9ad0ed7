"""Figure of the steps that run once per document, and those that run for each question."""

from __future__ import annotations

from figures.canvas import Canvas


def _box(canvas: Canvas, x: float, y: float, title: str, note: str, fill: str) -> None:
    canvas.rect(x, y, 132, 56, fill)
    canvas.text(x + 66, y + 24, title, anchor="middle", bold=True, size=14)
    canvas.text(x + 66, y + 43, note, anchor="middle", size=11.5)


def draw() -> str:
    """Draw two rows of boxes, joined at the store."""
    canvas = Canvas(
        760,
        292,
        "Once per document: text, prefill, store. For each question: stitch from the store, score, "
        "select, recompute together with the prompt, answer.",
    )
    canvas.text(20, 30, "Once per document", bold=True, fill="soft")
    for x, title, note, fill in (
        (20, "token ids", "of one document", "none"),
        (188, "prefill", "alone, after the prefix", "old"),
        (356, "store", "unrotated keys, values", "old"),
    ):
        _box(canvas, x, 44, title, note, fill)
    canvas.arrow((152, 72), (186, 72))
    canvas.arrow((320, 72), (354, 72))
    canvas.line(20, 126, 740, 126)
    canvas.text(20, 150, "For each", bold=True, fill="soft")
    steps = (
        ("stitch", "rotate keys once", "new"),
        ("score", "where does it look?", "new"),
        ("select", "r · T tokens", "new"),
        ("recompute", "with the prompt", "new"),
    )
    for index, (title, note, fill) in enumerate(steps):
        x = 20 + index * 150
        _box(canvas, x, 176, title, note, fill)
        canvas.arrow((x + 132, 204), (x + 148, 204))
    canvas.rect(620, 176, 120, 56, "none")
    canvas.text(680, 200, "first token", anchor="middle", bold=True, size=14)
    canvas.text(680, 219, "then decode", anchor="middle", size=11.5)
    canvas.arrow((422, 100), (422, 154), (116, 154), (116, 174))
    canvas.text(20, 166, "question", bold=True, fill="soft")
    canvas.text(186, 266, "the question's tokens go in here ...", size=12, fill="soft")
    canvas.text(486, 266, "... and the prompt here", size=12, fill="soft")
    canvas.arrow((236, 252), (236, 234))
    canvas.arrow((536, 252), (536, 234))
    return canvas.render()
