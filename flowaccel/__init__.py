"""flowaccel makes any diffusers flow or diffusion pipeline faster, and proves it."""

import sys

# `python -m flowaccel` puts the working directory before all else, and what lies there would be imported in the place
# of a library. (While `-m` looks for its module, argv[0] is "-m".)
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    del sys.path[0]

# The base classes must be importable from here: diffusers looks them up in the library that a model_index.json names.
from diffusers import DiffusionPipeline as DiffusionPipeline
from diffusers import ModelMixin as ModelMixin
from diffusers import SchedulerMixin as SchedulerMixin

from flowaccel.accelerators import Accelerator as Accelerator
from flowaccel.accelerators import AdaptiveGuidance as AdaptiveGuidance
from flowaccel.accelerators import AgentAttention as AgentAttention
from flowaccel.accelerators import DynamicWidth as DynamicWidth
from flowaccel.accelerators import FeatureCache as FeatureCache
from flowaccel.accelerators import GuidanceInterval as GuidanceInterval
from flowaccel.accelerators import GuidanceSkip as GuidanceSkip
from flowaccel.accelerators import LearnedPolicy as LearnedPolicy
from flowaccel.accelerators import LevelCache as LevelCache
from flowaccel.accelerators import Mediators as Mediators
from flowaccel.accelerators import MediatorSchedule as MediatorSchedule
from flowaccel.accelerators import MixtureOfExperts as MixtureOfExperts
from flowaccel.accelerators import Sampler as Sampler
from flowaccel.accelerators import SparseAttention as SparseAttention
from flowaccel.accelerators import StepSkip as StepSkip
from flowaccel.accelerators import VelocityRefiner as VelocityRefiner
from flowaccel.accelerators import cache_preset as cache_preset
from flowaccel.compat import register_components
from flowaccel.errors import CheckpointError as CheckpointError
from flowaccel.errors import FlowaccelError as FlowaccelError
from flowaccel.errors import MissingExtraError as MissingExtraError
from flowaccel.errors import PipelineBusyError as PipelineBusyError
from flowaccel.errors import RecipeConflictError as RecipeConflictError
from flowaccel.errors import UnsupportedModelError as UnsupportedModelError
from flowaccel.errors import WeightsNotFoundError as WeightsNotFoundError
from flowaccel.models import DigitsClassifier as DigitsClassifier
from flowaccel.models import SiTTransformer2DModel as SiTTransformer2DModel
from flowaccel.pipelines import SiTImg2ImgPipeline as SiTImg2ImgPipeline
from flowaccel.pipelines import SiTInpaintPipeline as SiTInpaintPipeline
from flowaccel.pipelines import SiTPipeline as SiTPipeline
from flowaccel.recipe import Recipe as Recipe
from flowaccel.recipe import Report as Report
from flowaccel.recipe import accelerate as accelerate
from flowaccel.recipe import accelerated as accelerated
from flowaccel.recipe import is_accelerated as is_accelerated
from flowaccel.recipe import report as report
from flowaccel.recipe import restore as restore
from flowaccel.samplers import FlowAdamsBashforthScheduler as FlowAdamsBashforthScheduler
from flowaccel.samplers import FlowRungeKuttaScheduler as FlowRungeKuttaScheduler
from flowaccel.samplers import FlowSDEScheduler as FlowSDEScheduler
from flowaccel.samplers import FlowTurboScheduler as FlowTurboScheduler

register_components("flowaccel")

__version__ = "0.1.0"

__all__ = [
    "Accelerator",
    "AdaptiveGuidance",
    "AgentAttention",
    "CheckpointError",
    "DigitsClassifier",
    "DynamicWidth",
    "FeatureCache",
    "FlowAdamsBashforthScheduler",
    "FlowRungeKuttaScheduler",
    "FlowSDEScheduler",
    "FlowTurboScheduler",
    "FlowaccelError",
    "GuidanceInterval",
    "GuidanceSkip",
    "LearnedPolicy",
    "LevelCache",
    "MediatorSchedule",
    "Mediators",
    "MissingExtraError",
    "MixtureOfExperts",
    "PipelineBusyError",
    "Recipe",
    "RecipeConflictError",
    "Report",
    "Sampler",
    "SiTImg2ImgPipeline",
    "SiTInpaintPipeline",
    "SiTPipeline",
    "SiTTransformer2DModel",
    "SparseAttention",
    "StepSkip",
    "UnsupportedModelError",
    "VelocityRefiner",
    "WeightsNotFoundError",
    "accelerate",
    "accelerated",
    "cache_preset",
    "is_accelerated",
    "report",
    "restore",
]
