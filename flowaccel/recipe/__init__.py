"""Recipes: ordered accelerators, as objects, JSON and preset names; and the three verbs that put them on a pipeline."""

from flowaccel.recipe.presets import PRESETS as PRESETS
from flowaccel.recipe.presets import RecipeLike as RecipeLike
from flowaccel.recipe.presets import preset as preset
from flowaccel.recipe.presets import resolve as resolve
from flowaccel.recipe.presets import saved_recipe as saved_recipe
from flowaccel.recipe.recipe import SCHEMA as SCHEMA
from flowaccel.recipe.recipe import Base as Base
from flowaccel.recipe.recipe import Recipe as Recipe
from flowaccel.recipe.report import Report as Report
from flowaccel.recipe.report import StepReport as StepReport
from flowaccel.recipe.report import report as report
from flowaccel.recipe.storage import FILE_NAME as FILE_NAME
from flowaccel.recipe.storage import HUB_OPTIONS as HUB_OPTIONS
from flowaccel.recipe.verbs import accelerate as accelerate
from flowaccel.recipe.verbs import accelerated as accelerated
from flowaccel.recipe.verbs import is_accelerated as is_accelerated
from flowaccel.recipe.verbs import recipe_of as recipe_of
from flowaccel.recipe.verbs import restore as restore

__all__ = [
    "FILE_NAME",
    "HUB_OPTIONS",
    "PRESETS",
    "SCHEMA",
    "Base",
    "Recipe",
    "RecipeLike",
    "Report",
    "StepReport",
    "accelerate",
    "accelerated",
    "is_accelerated",
    "preset",
    "recipe_of",
    "report",
    "resolve",
    "restore",
    "saved_recipe",
]
