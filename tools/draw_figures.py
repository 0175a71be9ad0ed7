"""Draw the documentation's figures into docs/figures; run it after new measurements."""

from __future__ import annotations

from pathlib import Path

from figures import arena, attention, floors, flow, geometries, speed

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "figures"
RESULTS = ROOT / "benchmarks" / "results"


def figures() -> dict[str, str]:
    """Return every figure's content by file name."""
    drawn = {
        "arena.svg": arena.draw(),
        "attention.svg": attention.draw(),
        "floors.svg": floors.draw(),
        "flow.svg": flow.draw(),
        "geometries.svg": geometries.draw(),
    }
    for results in sorted(RESULTS.glob("ttft-*.json")):
        drawn |= speed.draw_all(results)
    return drawn


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, content in figures().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
        print(f"docs/figures/{name}")
