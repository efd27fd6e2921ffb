"""When to compute: small frozen objects, pure functions of a signal, per image."""

from flowaccel.gates.base import Gate as Gate
from flowaccel.gates.base import Step as Step
from flowaccel.gates.change import FirstBlock as FirstBlock
from flowaccel.gates.change import ModulatedInput as ModulatedInput
from flowaccel.gates.codebook import Codebook as Codebook
from flowaccel.gates.easy import Easy as Easy
from flowaccel.gates.magnitude import Magnitude as Magnitude
from flowaccel.gates.schedules import Interval as Interval
from flowaccel.gates.schedules import Mask as Mask
from flowaccel.gates.third_difference import ThirdDifference as ThirdDifference

GATES: dict[str, type[Gate]] = {
    kind.name: kind for kind in (Interval, Mask, FirstBlock, ModulatedInput, Magnitude, Easy, Codebook, ThirdDifference)
}
"""By the names that recipes use."""

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
