"""Rates: the measured numbers of a machine that predictions are made from."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ifkv.planning.calibration.curves import Curve, Grid

# Version of the file; raise it when a rate changes its meaning.
VERSION = 3


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates of one machine for one shape of layers, dtype, device, number of threads and backend.

    Attributes:
        date: Date of measuring, ``YYYY-MM-DD``.
        layer: Seconds of one decoder layer without its attention, over rows. The point of one row
            is the overhead of Python and dispatch, and one read of the weights.
        prefill_attention: Operations per second of an ordinary causal attention, over tokens; the
            second size is not used.
        rows_attention: Operations per second of attention for scattered rows, over slots of the
            context and the share of them that is recomputed. The operations are those of
            `ifkv.cost.recompute_cost`, so operations that tiles waste lower the rate.
        query_attention: Operations per second of attention for query tokens over a context, over
            slots and query tokens.
        norms: Operations per second of attention norms, over slots and query tokens.
        value_bytes: Bytes of values per second when their norms are taken.
        weight_bytes: Bytes of weights per second when one row is multiplied by a large matrix.
        stitch_bytes: Bytes of keys and values per second, read, rotated and written.
        stitch_document: Seconds that every document adds to stitching.
        host_bytes: Bytes per second from host memory to the device; None on a CPU.
        warm_bytes: Bytes of keys and values per second from a store on the disk of the cache
            folder, read from the system's page cache; None if that disk could not be measured.
        cold_bytes: The same, read past the page cache.
        open_document: Seconds to open one document of such a store.
        disagreement: Factor between two passes of measuring, on the piece of work where they differ
            most; 1 if they agree. The disk is left out, since it varies on an idle machine too.
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
        """Return the rates as an object that `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, found: Any) -> Rates:
        """Read rates that `to_json` made.

        Raises:
            ValueError: The object is anything else.
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
        raise ValueError(f"{value!r} is not a number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is not a number of at least 0")
    return float(value)


def _positive(value: Any) -> float:
    number = _number(value)
    if number == 0:
        raise ValueError("0 where a positive number belongs")
    return number


def _factor(value: Any) -> float:
    number = _number(value)
    if number < 1:
        raise ValueError(f"{value!r} is not a factor of at least 1")
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
        raise ValueError("a curve whose sizes and seconds differ in number")
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
        raise ValueError("a grid whose sizes and rates differ in number")
    return grid
