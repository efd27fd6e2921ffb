"""Parts of `GuidanceSkip`: when images are guided, and what happens at a network call."""

from flowaccel.accelerators.guidance.runtime import Guiding as Guiding
from flowaccel.accelerators.guidance.when import WHENS as WHENS
from flowaccel.accelerators.guidance.when import AdaptiveGuidance as AdaptiveGuidance
from flowaccel.accelerators.guidance.when import GuidanceInterval as GuidanceInterval
from flowaccel.accelerators.guidance.when import When as When

__all__ = ["WHENS", "AdaptiveGuidance", "GuidanceInterval", "Guiding", "When"]
