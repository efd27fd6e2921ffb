"""Fits the numbers of caches to a user's own runs."""

from flowaccel.calibration.calibrate import Observation as Observation
from flowaccel.calibration.calibrate import calibrate as calibrate
from flowaccel.calibration.calibrate import find_method as find_method
from flowaccel.calibration.calibrate import fitted as fitted
from flowaccel.calibration.calibrate import observe_methods as observe_methods
from flowaccel.calibration.calibrate import verified as verified
from flowaccel.calibration.methods import METHODS as METHODS
from flowaccel.calibration.methods import Method as Method
from flowaccel.calibration.sampling import Sampling as Sampling

__all__ = [
    "METHODS",
    "Method",
    "Observation",
    "Sampling",
    "calibrate",
    "find_method",
    "fitted",
    "observe_methods",
    "verified",
]
