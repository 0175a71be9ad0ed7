"""Write the results of `ifkv eval` into docs/arena.md: `python tools/arena_tables.py`.

On the page each table is between `<!-- arena: KIND FILE RATIO -->` and `<!-- /arena -->`. FILE
means `benchmarks/results/arena-FILE.csv`; an overview over all files has a selector in its place.
`--take FOLDER FILE` first makes these files from a folder that `ifkv eval` wrote.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from speed_tables import as_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "arena.md"
BLOCK = re.compile(r"(<!-- arena: (\w+) ([\w-]+) ([\d.]+) -->\n).*?(\n<!-- /arena -->)", re.DOTALL)
DEFAULT, PAPER = "sink-aware", "attention-norm"
MIDDLE = "sensitivity-aware:layers=0.2-0.7"
PUBLISHED = (PAPER, "prophetkv", "cacheblend", "epic")
# Each way, and the ways that it is compared with.
PAIRS = {
    "sensitivity-aware": (DEFAULT, MIDDLE, *PUBLISHED),
    DEFAULT: PUBLISHED,
    "deviation-aware": PUBLISHED,
    PAPER: PUBLISHED[1:],
}
# Files of the overviews, and the model and data of each.
SETTINGS = {
    "135m-hotpotqa-float32": "135M, HotpotQA",
    "135m-squad-float32": "135M, SQuAD",
    "500m-hotpotqa-float32": "0.5B, HotpotQA",
    "500m-squad-float32": "0.5B, SQuAD",
}
# Ways that are no selector for a request: an upper end, a lower end, and the oracle.
REFERENCE_POINTS = ("full prefill", "stitch only", "oracle")
Row = dict[str, str]


def rows_of(file: str, questions: str = "all") -> list[Row]:
    """Return the rows of a results file over all questions, or over its first or second half."""
    return [row for row in _read(f"arena-{file}.csv") if row["questions"] == questions]


def quality(file: str, ratio: float) -> str:
    """Return a table of every way's quality at one ratio."""
    rows = []
    for row in rows_of(file):
        plain = row["way"] in ("full prefill", "stitch only")
        if not plain and float(row["ratio"] or -1) != ratio:
            continue
        cost, kl, top1 = (f"{float(row[name]):.3f}" for name in ("flops", "kl", "top1"))
        gap, nll = "–" if plain else _percent(row, "gap"), f"{float(row['nll']):.2f}"
        rows.append([_name(row["way"]), cost, gap, kl, top1, nll])
    return as_table("way | cost | gap recovered | KL | top-1 | NLL", rows, 1)


def pairs(file: str, ratio: float) -> str:
    """Return a table of paired differences, at equal ratio and at equal operations."""
    found = {
        (row["at"], row["first"], row["second"]): row
        for row in _read(f"arena-{file}-differences.csv")
        if row["questions"] == "all" and float(row["ratio"] or -1) == ratio
    }
    rows = []
    for first, rivals in PAIRS.items():
        for second in rivals:
            here = [found.get((at, first, second)) for at in ("equal ratio", "equal cost")]
            if here[0] is None:
                continue
            cells = [(_points(row), _factor(row)) if row else ("–", "–") for row in here]
            rows.append([_name(first), _name(second), *cells[0], *cells[1]])
    head = "first | against | more of the gap | KL, typically | at equal operations | KL, typically"
    return as_table(head, rows, 2)


def overview(way: str, ratio: float) -> str:
    """Return a table of one way in every setting, and its lead over published rules."""
    rows = []
    for file, setting in SETTINGS.items():
        [own] = [row for row in rows_of(file) if row["way"] == way and float(row["ratio"]) == ratio]
        ahead = {
            row["second"]: _points(row, clear_bold=True)
            for row in _read(f"arena-{file}-differences.csv")
            if (row["questions"], row["at"], row["first"]) == ("all", "equal cost", way)
            and float(row["ratio"] or -1) == ratio
        }
        cells = [ahead.get(rule, "–") for rule in PUBLISHED]
        rows.append([setting, own["count"], _percent(own, "gap"), *cells])
    head = ["model, data", "questions", "gap recovered", *(f"over `{rule}`" for rule in PUBLISHED)]
    return as_table(" | ".join(head), rows, 1)


def ratios(file: str, _: float) -> str:
    """Return a table of the gap by ratio, for every way that ran at more than one ratio."""
    ways: dict[str, dict[float, Row]] = {}
    for row in rows_of(file):
        if row["way"] not in REFERENCE_POINTS and row["ratio"]:
            ways.setdefault(row["way"], {})[float(row["ratio"])] = row
    swept = {way: found for way, found in ways.items() if len(found) > 1}
    every = sorted({ratio for found in swept.values() for ratio in found})
    rows = [
        [_name(way), *(_percent(found[ratio], "gap") if ratio in found else "–" for ratio in every)]
        for way, found in swept.items()
    ]
    return as_table(" | ".join(["way", *(f"r = {ratio:g}" for ratio in every)]), rows, 1)


def halves(file: str, ratio: float) -> str:
    """Return a table for the best rule of the first half, measured on the second half."""

    def at(questions: str) -> dict[str, Row]:
        return {
            row["way"]: row
            for row in rows_of(file, questions)
            if row["way"] not in REFERENCE_POINTS and float(row["ratio"] or -1) == ratio
        }

    first, second = at("first half"), at("second half")
    best = max(first, key=lambda way: float(first[way]["gap"]))
    rows = [[_name(best), "", _percent(second[best], "gap"), ""]]
    rows += [
        [_name(best), _name(row["second"]), _points(row), _factor(row)]
        for row in _read(f"arena-{file}-differences.csv")
        if (row["questions"], row["at"], row["first"]) == ("second half", "equal ratio", best)
        and float(row["ratio"] or -1) == ratio
        and row["second"] not in REFERENCE_POINTS
    ]
    return as_table(
        "chosen on the first half | against | gap, second half | KL, typically", rows, 2
    )


def surrogate(file: str, _: float) -> str:
    """Return a table of ways behind surrogate contexts beside the same ways on plain documents."""
    at_equal_ratio = {
        (row["first"], row["second"], row["ratio"]): row
        for row in _read(f"arena-{file}-differences.csv")
        if row["questions"] == "all" and row["at"] == "equal ratio"
    }
    named = {(row["way"], row["ratio"]): row for row in rows_of(file)}
    rows = []
    for (way, ratio), row in sorted(
        named.items(), key=lambda item: (item[0][0], float(item[0][1]))
    ):
        rule, behind, text = way.partition(" behind ")
        alone = named.get((rule, ratio))
        if not behind or alone is None:
            continue
        difference = at_equal_ratio.get((way, rule, ratio))
        cells = [_points(difference), _factor(difference)] if difference else ["–", "–"]
        gaps = ["0 %" if rule == "stitch only" else _percent(alone, "gap"), _percent(row, "gap")]
        top1 = [f"{float(each['top1']):.3f}" for each in (alone, row)]
        name = f"`{text.rpartition('-')[0]}`"  # without the beginning of the hash
        rows.append([_name(rule), name, f"{float(ratio):g}", row["count"], *gaps, *cells, *top1])
    head = (
        "way | surrogate | r | questions | gap, alone | gap, behind it | difference | "
        "KL, typically | top-1, alone | top-1, behind it"
    )
    return as_table(head, rows, 2)


TABLES: dict[str, Callable[[str, float], str]] = {
    "overview": overview,
    "quality": quality,
    "pairs": pairs,
    "ratios": ratios,
    "halves": halves,
    "surrogate": surrogate,
}


def filled(text: str) -> str:
    """Return a page with its tables filled from the results."""
    return BLOCK.sub(
        lambda found: (
            found[1] + "\n" + TABLES[found[2]](found[3], float(found[4])) + "\n" + found[5]
        ),
        text,
    )


def take(folder: Path, file: str) -> None:
    """Make results files from a folder: over all questions, and over halves by a hash of ids."""
    from ifkv.evaluation.results_log import Ledger
    from ifkv.evaluation.summary import Summary
    from ifkv.evaluation.tables import comma_separated, csv_of

    ledger = Ledger(folder)
    even = {
        question: hashlib.sha256(question.encode()).digest()[0] % 2 == 0
        for question in ledger.references
    }
    parts = {
        "all": list(even),
        "first half": [question for question, here in even.items() if here],
        "second half": [question for question, here in even.items() if not here],
    }
    rows, differences = [], []
    for name, questions in parts.items():
        summary = Summary(ledger, only=questions)
        rows += csv_of(summary.rows, questions=name)
        for at, equal_cost in (("equal ratio", False), ("equal cost", True)):
            found = summary.differences(equal_cost=equal_cost)
            differences += csv_of(found, questions=name, at=at)
    for name, lines in (
        (f"arena-{file}.csv", rows),
        (f"arena-{file}-differences.csv", differences),
    ):
        (RESULTS / name).write_text(comma_separated(lines), encoding="utf-8")


def _read(name: str) -> Iterable[Row]:
    with (RESULTS / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _name(way: str) -> str:
    if way in ("full prefill", "stitch only"):
        return way
    return f"`{way}` (default)" if way == DEFAULT else f"`{way}`"


def _percent(row: Row, name: str) -> str:
    value, low, high = (round(100 * float(row[name + end])) + 0 for end in ("", "_low", "_high"))
    return f"{value} % [{low}, {high}]"


def _points(row: Row, *, clear_bold: bool = False) -> str:
    value, low, high = (round(100 * float(row["gap" + end])) for end in ("", "_low", "_high"))
    text = f"{value:+d} [{low:+d}, {high:+d}]".replace("-", "−").replace("+0", "0")
    clear = float(row["gap_low"]) > 0 or float(row["gap_high"]) < 0
    return f"**{text}**" if clear_bold and clear else text


def _factor(row: Row) -> str:
    value, low, high = (float(row["kl_ratio" + end]) for end in ("", "_low", "_high"))
    return f"{value:.2f}× [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--take", nargs=2, metavar=("FOLDER", "FILE"))
    given = parser.parse_args()
    if given.take:
        take(Path(given.take[0]), given.take[1])
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
