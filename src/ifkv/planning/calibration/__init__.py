"""What this machine can do, measured in some seconds and kept: what predictions are made from.

`rates_for` gives the rates of a model's layers. The pieces of work that are timed are the
library's own (a layer without its attention, scattered rows, a query, norms, stitching, a store's
documents), in the model's own shapes, on random weights.
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
