"""Gates, which decide when to compute: small frozen objects, pure functions of a signal, per image."""

from flowaccel.caching.gates.base import Gate, Step
from flowaccel.caching.gates.change import FirstBlock, ModulatedInput
from flowaccel.caching.gates.codebook import Codebook
from flowaccel.caching.gates.easy import Easy
from flowaccel.caching.gates.magnitude import Magnitude
from flowaccel.caching.gates.schedules import Interval, Mask
from flowaccel.caching.gates.third_difference import ThirdDifference

GATES: dict[str, type[Gate]] = {
    kind.name: kind for kind in (Interval, Mask, FirstBlock, ModulatedInput, Magnitude, Easy, Codebook, ThirdDifference)
}
"""Gates by their names in recipes."""

__all__ = [
    "GATES",
    "Codebook",
    "Easy",
    "FirstBlock",
    "Gate",
    "Interval",
    "Magnitude",
    "Mask",
    "ModulatedInput",
    "Step",
    "ThirdDifference",
]
