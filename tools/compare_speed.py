"""Compare the speed of two checkouts of ifkv: time to first token, and batches.

    python tools/compare_speed.py OLD_CHECKOUT [NEW_CHECKOUT] --rounds 5

In every round each checkout runs its own ``benchmarks/ttft.py`` and ``benchmarks/batches.py`` in
separate processes, in alternating order. The medians over the rounds are compared row by row:
above 1.00 the new checkout is faster. Ctrl-C shows the rounds so far. Run it on an otherwise idle
machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
RUNS = {
    "ttft": ["--models", "smollm2", "--only", "times", "--dtypes", "float32"],
    "batches": ["--dtype", "float32", "--context", "500", "--new", "8"],
}


def run(checkout: Path, lengths: str) -> dict[str, float]:
    """Run a checkout's benchmarks once; return seconds by row."""
    found = {}
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    for name, options in RUNS.items():
        own = [*options, "--repeats", "1"]
        if name == "ttft":
            own += ["--lengths", lengths, "--ratios", "0.05,0.15", "--dense-ratios", "0.9"]
        with tempfile.TemporaryDirectory() as place:
            script = str(checkout / "benchmarks" / f"{name}.py")
            subprocess.run(
                [sys.executable, script, *own, "--results", place],
                env=environment,
                check=True,
                cwd=checkout,
                stdout=subprocess.DEVNULL,
            )
            for file in Path(place).glob("*.json"):
                for row in json.loads(file.read_text())["rows"]:
                    found |= seconds_of(name, row)
    return found


def seconds_of(name: str, row: dict[str, object]) -> dict[str, float]:
    """Return the times in one row of a benchmark, by name."""
    if name == "ttft":
        where = f"first token, {row['context']} tokens, r = {row['ratio']}"
        return {where: float(str(row["ttft_seconds"]))}
    where = f"{row['requests']} requests, {row['what']}"
    return {
        f"{where}, together": float(str(row["together_seconds"])),
        f"{where}, one by one": float(str(row["alone_seconds"])),
    }


def main() -> None:
    """Run the rounds and print a table."""
    parser = argparse.ArgumentParser(description="Compare the speed of two checkouts.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", nargs="?", type=Path, default=HERE)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", default="1024")
    given = parser.parse_args()
    checkouts = {"old": given.old.resolve(), "new": given.new.resolve()}
    times: dict[str, dict[str, list[float]]] = {"old": defaultdict(list), "new": defaultdict(list)}
    done = 0
    with contextlib.suppress(KeyboardInterrupt):  # the rounds so far are shown
        for number in range(given.rounds):
            for which in ("old", "new") if number % 2 else ("new", "old"):
                for row, seconds in run(checkouts[which], given.lengths).items():
                    times[which][row].append(seconds)
            done = number + 1
            print(f"round {done} of {given.rounds} done", file=sys.stderr)
    print(f"{platform.machine()}, medians of {done} rounds\n")
    print("| row | old, s | new, s | old / new |\n|:--|--:|--:|--:|")
    for row, new in times["new"].items():
        before, after = statistics.median(times["old"][row]), statistics.median(new)
        print(f"| {row} | {before:.3f} | {after:.3f} | {before / after:.2f} |")


if __name__ == "__main__":
    main()
