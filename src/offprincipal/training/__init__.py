"""Training recipes on TRL with the same settings except for the recipe, and evaluation on held-out prompts.

Importing this package imports torch; transformers, TRL and datasets are imported when a model is opened or trained.
"""

from offprincipal.recipes import RECIPES, Recipe
from offprincipal.training.evaluation import evaluate
from offprincipal.training.progress import ShowProgress, StepReport, silent, terminal_progress
from offprincipal.training.runs import train
from offprincipal.training.settings import TrainSettings, parse_settings

__all__ = [
    "RECIPES",
    "Recipe",
    "ShowProgress",
    "StepReport",
    "TrainSettings",
    "evaluate",
    "parse_settings",
    "silent",
    "terminal_progress",
    "train",
]
