"""Training recipes on TRL, matched in everything but the recipe, and the measuring of models on held-out prompts.

torch is imported with this package; transformers, TRL and datasets only when a model is opened or trained.
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
