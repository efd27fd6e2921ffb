"""Predictors of values that are not computed: pure functions of the positions of the computed values."""

from flowaccel.caching.predictors.adams_bashforth import AdamsBashforth
from flowaccel.caching.predictors.base import Predictor
from flowaccel.caching.predictors.hold import Hold
from flowaccel.caching.predictors.newton import Newton
from flowaccel.caching.predictors.taylor import Hermite, Taylor

PREDICTORS: dict[str, type[Predictor]] = {kind.name: kind for kind in (Hold, Newton, Taylor, Hermite, AdamsBashforth)}
"""Predictors by their names in recipes."""

__all__ = ["PREDICTORS", "AdamsBashforth", "Hermite", "Hold", "Newton", "Predictor", "Taylor"]
