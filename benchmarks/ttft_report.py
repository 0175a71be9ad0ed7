"""Results of ttft.py: merged into one file, as a table on the screen and as Markdown."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.live import Live
from rich.table import Table

import ifkv
from bench_models import MODELS

Row = dict[str, Any]
COLUMNS = (
    "context", "r", "full prefill", "ifkv TTFT", "speed-up", "S(r)", "share of S(r)", "stitch",
    "select", "recompute + prompt", "dense mask", "over ifkv", "peak above",
)  # fmt: skip


def processor() -> str:
    """Return the processor's name, and its instructions that multiply matrices fastest."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = dict(line.partition("\t")[::2] for line in reversed(lines) if "\t" in line)
    name = found.get("model name", "").strip(": \t") or platform.processor()
    flags = found.get("flags", "").split()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name or platform.machine()} ({', '.join(known)})" if known else name


def about_machine() -> Row:
    """Return the date, the machine and the versions of a measurement."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ifkv": ifkv.__version__,
    }


def key_of(row: Row) -> tuple[str, str, int, float]:
    """Return the setting of a row; a newer row of the same setting replaces its numbers."""
    return row["model"], row["dtype"], row["context"], row["ratio"]


def merge(old: list[Row], new: list[Row]) -> list[Row]:
    """Return old rows updated by new ones, ordered by setting.

    >>> row = {"model": "m", "dtype": "float32", "context": 9, "ratio": 0.1}
    >>> merge([row | {"speedup": 1}], [row | {"peak_extra_bytes": 2}])[0]["speedup"]
    1
    """
    rows = {key_of(row): row for row in old}
    for row in new:
        rows[key_of(row)] = rows.get(key_of(row), {}) | row
    models, dtypes = list(MODELS.values()), ("float32", "bfloat16")

    def place(row: Row) -> tuple[int, int, int, float]:
        known = models.index(row["model"]) if row["model"] in models else len(models)
        return known, dtypes.index(row["dtype"]), row["context"], row["ratio"]

    return sorted(rows.values(), key=place)


def peak_share(row: Row) -> float | None:
    """Return peak memory above weights and stitched cache, as a share of the two."""
    if "peak_extra_bytes" not in row:
        return None
    return row["peak_extra_bytes"] / (row["weight_bytes"] + row["stitched_bytes"])


def cells(row: Row) -> list[str]:
    """Return a row's cells for `COLUMNS`; a dash where nothing was measured."""

    def shown(form: str, value: float | None) -> str:
        return "–" if value is None else form.format(value)

    steps = row.get("steps")
    selecting = steps and steps.get("score", 0.0) + steps["select"]
    peak, extra = peak_share(row), row.get("peak_extra_bytes")
    return [
        f"{row['context']:,}",
        f"{row['ratio']:.2f}",
        shown("{:.2f} s", row.get("full_seconds")),
        shown("{:.2f} s", row.get("ttft_seconds")),
        shown("{:.2f}×", row.get("speedup")),
        shown("{:.2f}×", row.get("bound")),
        shown("{:.0%}", row.get("share_of_bound")),
        shown("{:.3f} s", steps and steps["stitch"]),
        shown("{:.3f} s", selecting),
        shown("{:.2f} s", steps and steps["recompute"]),
        shown("{:.2f} s", row.get("dense_seconds")),
        shown("{:.1f}×", row.get("dense_over_recompute")),
        "–" if peak is None else f"{extra / 2**20:.0f} MiB, {peak:.1%}",
    ]


def as_markdown(rows: list[Row]) -> str:
    """Return a page with one table per model and dtype."""
    lines = [
        "# Hot time to first token on the CPU",
        "",
        "Made by `python benchmarks/ttft.py`, whose docstring says what is measured. Medians of "
        "interleaved rounds; speed-ups are medians of the ratios within a round. *Dense mask*: "
        "recomputing the same rows and the prompt with a dense mask; *over ifkv*: its time over "
        "that of ifkv's recompute. *Peak above*: memory above weights, documents and stitched "
        "cache, and as a share of weights and stitched cache.",
    ]
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        lines += ["", f"## {model}, {dtype}", ""]
        timed = [row for row in own if "torch" in row]
        if timed:
            some = timed[-1]
            counts = sorted({row["repeats"] for row in timed})
            span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            lines += [
                f"{some['date']}, {some['processor']}, {some['threads']} threads, torch "
                f"{some['torch']}, transformers {some['transformers']}; {span} rounds. Tokens "
                f"selected by `{some.get('selector', 'attention-norm')}`.",
                "",
            ]
        lines += [f"| {' | '.join(COLUMNS)} |", "|" + "--:|" * len(COLUMNS)]
        lines += [f"| {' | '.join(cells(row))} |" for row in own]
    return "\n".join(lines) + "\n"


class Report:
    """Results so far, shown on the screen and written to files.

    Args:
        stem: Path of the files without suffix.
        console: Console that shows them.
    """

    def __init__(self, stem: Path, console: Console):
        self.stem, self.console = stem, console
        path = stem.with_suffix(".json")
        self.rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
        self.fresh: set[tuple[str, str, int, float]] = set()
        self.doing = "loading"
        self.live: Live | None = None

    def tell(self, text: str) -> None:
        """Show what is being measured now."""
        self.doing = text
        if self.live is not None:
            self.live.update(self.table())

    def add(self, new: list[Row]) -> None:
        """Merge rows into the files and the table on the screen."""
        self.rows = merge(self.rows, new)
        self.fresh |= {key_of(row) for row in new}
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"rows": self.rows}, indent=1)
        self.stem.with_suffix(".json").write_text(text + "\n")
        self.stem.with_suffix(".md").write_text(as_markdown(self.rows))
        if self.live is not None:
            self.live.update(self.table())
        else:
            for row in new:
                text = "  ".join((row["model"], row["dtype"], *cells(row)))
                self.console.print(text, soft_wrap=True, highlight=False)

    def table(self) -> Table:
        """Return a table of this run's rows."""
        table = Table(caption=self.doing, caption_justify="left")
        for column in ("model", "dtype", *COLUMNS):
            table.add_column(column, justify="left" if column in ("model", "dtype") else "right")
        for row in self.rows:
            if key_of(row) in self.fresh:
                table.add_row(row["model"], row["dtype"], *cells(row))
        return table


@contextlib.contextmanager
def show(stem: Path) -> Iterator[Report]:
    """Open a report: a live table on a terminal, a printed line per row elsewhere."""
    console = Console()
    report = Report(stem, console)
    if not console.is_terminal:
        yield report
        return
    with Live(report.table(), console=console, refresh_per_second=2) as live:
        report.live = live
        yield report
        report.tell(f"Written to {stem}.json and {stem}.md")
