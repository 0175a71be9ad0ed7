"""Machines for tests of plans: rates that are known, instead of measured ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from ifkv.cost import ModelShape
from ifkv.planning.calibration import Curve, Grid, Rates, kept


def flat(operations: float) -> Grid:
    return Grid((1.0,), (1.0,), ((operations,),))


def machine(layer: Curve, operations: float = 1e30, **others: float | None) -> Rates:
    """Layers take the time of a curve, all else as good as none if not given."""
    rate = flat(operations)
    settings: dict[str, float | None] = {
        "value_bytes": 1e30,
        "weight_bytes": 1e30,
        "stitch_bytes": 1e30,
        "stitch_document": 0.0,
        "host_bytes": None,
    }
    return Rates("2026-01-01", layer, rate, rate, rate, rate, **{**settings, **others})


def ideal(shape: ModelShape, operations: float) -> Rates:
    """A machine with one rate for every operation, and nothing else that takes time."""
    return machine(Curve((1.0,), (2 * shape.layer_parameters / operations,)), operations)


# An overhead, and so much a row.
ROWS_COST = machine(Curve((1.0, 2.0), (1.0, 2.0)))
PASSES_COST = machine(Curve((1.0, 2.0), (1.0, 1.000001)))


def never_measured(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[object]:
    """Let nothing measure this machine, and keep rates in a folder; how often one wanted to."""
    times: list[object] = []

    def measure(*arguments: object, **options: object) -> Rates:
        times.append(options["disk"])
        return ROWS_COST

    monkeypatch.setattr(kept, "measure", measure)
    monkeypatch.setenv("IFKV_CACHE", str(folder))
    return times
