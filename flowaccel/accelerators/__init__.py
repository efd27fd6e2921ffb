"""What a user switches on: one file each."""

from flowaccel.accelerators.agent_attention import AgentAttention as AgentAttention
from flowaccel.accelerators.base import Accelerator as Accelerator
from flowaccel.accelerators.cache_presets import CACHE_PRESETS as CACHE_PRESETS
from flowaccel.accelerators.cache_presets import cache_preset as cache_preset
from flowaccel.accelerators.calibration import Calibration as Calibration
from flowaccel.accelerators.calibration import GridCalibration as GridCalibration
from flowaccel.accelerators.dynamic_width import DynamicWidth as DynamicWidth
from flowaccel.accelerators.feature_cache import FeatureCache as FeatureCache
from flowaccel.accelerators.guidance import AdaptiveGuidance as AdaptiveGuidance
from flowaccel.accelerators.guidance import GuidanceInterval as GuidanceInterval
from flowaccel.accelerators.guidance_skip import GuidanceSkip as GuidanceSkip
from flowaccel.accelerators.learned_policy import LearnedPolicy as LearnedPolicy
from flowaccel.accelerators.level_cache import LEVELS as LEVELS
from flowaccel.accelerators.level_cache import Level as Level
from flowaccel.accelerators.level_cache import LevelCache as LevelCache
from flowaccel.accelerators.mediator_schedule import MediatorSchedule as MediatorSchedule
from flowaccel.accelerators.mediators import Mediators as Mediators
from flowaccel.accelerators.mixture_of_experts import MixtureOfExperts as MixtureOfExperts
from flowaccel.accelerators.sampler import Sampler as Sampler
from flowaccel.accelerators.sparse_attention import SparseAttention as SparseAttention
from flowaccel.accelerators.step_skip import StepSkip as StepSkip
from flowaccel.accelerators.velocity_refiner import VelocityRefiner as VelocityRefiner

ACCELERATORS: dict[str, type[Accelerator]] = {
    kind.name: kind
    for kind in (
        Sampler,
        DynamicWidth,
        MixtureOfExperts,
        Mediators,
        VelocityRefiner,
        AgentAttention,
        SparseAttention,
        FeatureCache,
        LevelCache,
        StepSkip,
        LearnedPolicy,
        GuidanceSkip,
    )
}

__all__ = [
    "ACCELERATORS",
    "CACHE_PRESETS",
    "LEVELS",
    "Accelerator",
    "AdaptiveGuidance",
    "AgentAttention",
    "Calibration",
    "DynamicWidth",
    "FeatureCache",
    "GridCalibration",
    "GuidanceInterval",
    "GuidanceSkip",
    "LearnedPolicy",
    "Level",
    "LevelCache",
    "MediatorSchedule",
    "Mediators",
    "MixtureOfExperts",
    "Sampler",
    "SparseAttention",
    "StepSkip",
    "VelocityRefiner",
    "cache_preset",
]
