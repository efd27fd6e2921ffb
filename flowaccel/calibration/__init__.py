"""Fits the numbers of caches to a user's own runs, and searches step grids in them."""

from flowaccel.calibration.calibrate import Observation as Observation
from flowaccel.calibration.calibrate import calibrate as calibrate
from flowaccel.calibration.calibrate import find_method as find_method
from flowaccel.calibration.calibrate import fitted as fitted
from flowaccel.calibration.calibrate import observe_methods as observe_methods
from flowaccel.calibration.calibrate import verified as verified
from flowaccel.calibration.grids import GRID_METHODS as GRID_METHODS
from flowaccel.calibration.grids import METRICS as METRICS
from flowaccel.calibration.methods import METHODS as METHODS
from flowaccel.calibration.methods import Method as Method
from flowaccel.calibration.sampling import Sampling as Sampling
from flowaccel.calibration.steps import calibrate_grid as calibrate_grid
from flowaccel.calibration.steps import measured_grid as measured_grid
from flowaccel.calibration.steps import search_grids as search_grids

__all__ = [
    "GRID_METHODS",
    "METHODS",
    "METRICS",
    "Method",
    "Observation",
    "Sampling",
    "calibrate",
    "calibrate_grid",
    "find_method",
    "fitted",
    "measured_grid",
    "observe_methods",
    "search_grids",
    "verified",
]
