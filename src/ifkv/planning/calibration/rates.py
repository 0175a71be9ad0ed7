"""What a machine can do, as measured: the numbers that predictions are made from."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ifkv.planning.calibration.curves import Curve, Grid

# Of the file; raise it when what is measured changes its meaning.
VERSION = 3


@dataclasses.dataclass(frozen=True)
class Rates:
    """Measured on one machine for one shape of layers, dtype, device, threads and backend.

    Attributes:
        date: When, ``YYYY-MM-DD``.
        layer: Rows through one decoder layer without its attention: over rows. The point of one
            row is the overhead of Python and dispatch and one read of the weights.
        prefill_attention: An ordinary causal attention: operations per second over tokens; the
            second size is not used.
        rows_attention: Scattered rows: over slots of the context and the share of them that is
            recomputed. Operations are those of `ifkv.cost.recompute_cost`, so that what
            tiles compute in vain lowers the rate.
        query_attention: Query tokens over a context: over slots and query tokens.
        norms: Attention norms: over slots and query tokens.
        value_bytes: Bytes of values per second, whose sizes are taken.
        weight_bytes: Bytes of weights per second where one row meets a large matrix.
        stitch_bytes: Bytes of keys and values per second, read, rotated and written.
        stitch_document: Seconds that every document adds to stitching.
        host_bytes: Bytes per second from host memory to the device; None on a CPU.
        warm_bytes: Bytes of keys and values per second from a store on the disk of the cache
            folder, out of the system's page cache; None if that disk could not be measured.
        cold_bytes: The same, past the page cache.
        open_document: Seconds that opening one document of such a store takes.
        disagreement: How far two passes of measuring were apart on the piece of work that they
            agree on least: a factor, 1 for none. The disk is left out, since it wavers at rest,
            too.
    """

    date: str
    layer: Curve
    prefill_attention: Grid
    rows_attention: Grid
    query_attention: Grid
    norms: Grid
    value_bytes: float
    weight_bytes: float
    stitch_bytes: float
    stitch_document: float
    host_bytes: float | None
    warm_bytes: float | None = None
    cold_bytes: float | None = None
    open_document: float = 0.0
    disagreement: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, found: Any) -> Rates:
        """Read what `to_json` made.

        Raises:
            ValueError: It is anything else.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(found, dict) or set(found) != names:
            raise ValueError("other keys than those of rates")
        date = found["date"]
        optional = {
            name: None if found[name] is None else _positive(found[name])
            for name in ("host_bytes", "warm_bytes", "cold_bytes")
        }
        if not isinstance(date, str):
            raise ValueError("no date")
        return cls(
            date=date,
            layer=_curve(found["layer"]),
            prefill_attention=_grid(found["prefill_attention"]),
            rows_attention=_grid(found["rows_attention"]),
            query_attention=_grid(found["query_attention"]),
            norms=_grid(found["norms"]),
            value_bytes=_positive(found["value_bytes"]),
            weight_bytes=_positive(found["weight_bytes"]),
            stitch_bytes=_positive(found["stitch_bytes"]),
            stitch_document=_number(found["stitch_document"]),
            open_document=_number(found["open_document"]),
            disagreement=_factor(found["disagreement"]),
            **optional,
        )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no number of at least 0")
    return float(value)


def _positive(value: Any) -> float:
    number = _number(value)
    if number == 0:
        raise ValueError("0, where something was measured")
    return number


def _factor(value: Any) -> float:
    number = _number(value)
    if number < 1:
        raise ValueError(f"{value!r} is no factor of at least 1")
    return number


def _positives(values: Any, *, ascending: bool = False) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or not values:
        raise ValueError("no list of numbers")
    numbers = tuple(_positive(value) for value in values)
    if ascending and list(numbers) != sorted(set(numbers)):
        raise ValueError("sizes that do not ascend")
    return numbers


def _curve(found: Any) -> Curve:
    if not isinstance(found, dict) or set(found) != {"sizes", "seconds"}:
        raise ValueError("no curve")
    curve = Curve(_positives(found["sizes"], ascending=True), _positives(found["seconds"]))
    if len(curve.sizes) != len(curve.seconds):
        raise ValueError("a curve with sizes that were not measured")
    return curve


def _grid(found: Any) -> Grid:
    if not isinstance(found, dict) or set(found) != {"rows", "columns", "rates"}:
        raise ValueError("no grid")
    if not isinstance(found["rates"], list | tuple):
        raise ValueError("no grid")
    rates = tuple(_positives(row) for row in found["rates"])
    grid = Grid(
        _positives(found["rows"], ascending=True),
        _positives(found["columns"], ascending=True),
        rates,
    )
    if len(rates) != len(grid.rows) or any(len(row) != len(grid.columns) for row in rates):
        raise ValueError("a grid with sizes that were not measured")
    return grid
