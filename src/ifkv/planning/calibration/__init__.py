"""Rates of this machine, from which plans are predicted: measured in a few seconds, and kept.

`rates_for` returns the rates of a model's layers. The pieces of work that are timed are the
library's own (a layer without its attention, scattered rows, a query, norms, stitching, reading
documents of a store), in the model's shapes, on random weights.
"""

from ifkv.planning.calibration.curves import Curve, Grid
from ifkv.planning.calibration.disk import measure_disk
from ifkv.planning.calibration.kept import calibration_folder, rates_for
from ifkv.planning.calibration.measure import measure
from ifkv.planning.calibration.rates import Rates

__all__ = [
    "Curve",
    "Grid",
    "Rates",
    "calibration_folder",
    "measure",
    "measure_disk",
    "rates_for",
]
