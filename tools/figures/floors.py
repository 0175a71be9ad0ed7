"""Figure of the packages of src/ifkv on their floors; each imports from lower floors only."""

from __future__ import annotations

from figures.canvas import Canvas

# From the lowest floor up: each package, and what it contains.
FLOORS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("errors", "what can go wrong, in words"),),
    (("utils", "checks, progress, files"),),
    (("models", "facts about a transformers model"),),
    (("backends", "attention kernels"), ("cost", "operations, bytes"), ("demo", "a small model")),
    (("forward", "run rows through a model's layers"),),
    (("patching", "hook into a model, and undo it"),),
    (("documents", "one document's keys and values"),),
    (("cache", "one request's keys and values"), ("store", "documents that are kept")),
    (("steps", "score, select, reorder, recompute"),),
    (("generation", "from a cache to tokens"), ("selectors", "rules that choose the slots")),
    (("planning", "which ratio?"), ("report", "tables, pages"), ("testing", "oracle, verify")),
    (("session", "questions and texts: Session, Conversation, Answer"),),
    (("evaluation", "ways of answering compared over data sets"),),
    (("cli", "the command ifkv"),),
)
GROUPS = (  # packages, colour, legend
    ({"errors", "utils", "models", "backends", "cost", "demo", "forward", "patching"}, "prefix",
     "models and attention"),
    ({"documents", "cache", "store"}, "old", "keeps keys and values"),
    ({"steps", "generation", "selectors"}, "new", "does the method's steps"),
    ({"planning", "report", "testing", "session", "evaluation", "cli"}, "none",
     "meets the user"),
)  # fmt: skip
WIDTH, LEFT, TOP, HIGH, GAP = 760, 44, 58, 36, 6


def draw() -> str:
    """Draw a row of boxes per floor, the highest on top."""
    bottom = TOP + len(FLOORS) * (HIGH + GAP)
    canvas = Canvas(
        WIDTH,
        bottom + 46,
        f"The packages of ifkv on {len(FLOORS)} floors, from cli on top down to errors. Each "
        "imports from lower floors only.",
    )
    canvas.text(20, 28, "Packages import downwards only", bold=True, size=15)
    canvas.arrow((24, TOP), (24, bottom - GAP))
    colours = {name: fill for names, fill, _ in GROUPS for name in names}
    for row, floor in enumerate(reversed(FLOORS)):
        y = TOP + row * (HIGH + GAP)
        wide = (WIDTH - LEFT - 20 + GAP) / len(floor) - GAP
        for column, (name, note) in enumerate(floor):
            x = LEFT + column * (wide + GAP)
            canvas.rect(x, y, wide, HIGH, colours[name])
            canvas.text(x + 12, y + 23, name, bold=True, size=14)
            canvas.text(x + wide - 12, y + 23, note, anchor="end", size=11.5)
    for index, (_, fill, label) in enumerate(GROUPS):
        x = LEFT + index * 174
        canvas.rect(x, bottom + 14, 14, 14, fill)
        canvas.text(x + 20, bottom + 26, label, size=11.5)
    return canvas.render()
