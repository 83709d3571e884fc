"""offprincipal: what did post-training do to the weights: geometry, precision, or step length?

The verbs are functions here; the packages are nouns. Nothing heavy is imported before it is used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offprincipal.adapters import adapt
    from offprincipal.comparison import CompareSettings, Comparison, MatrixSettings, compare, read_comparison
    from offprincipal.deltas import apply_delta, make_delta
    from offprincipal.forecast import preflight
    from offprincipal.gates import measure_gates
    from offprincipal.interventions import intervene, undo
    from offprincipal.training import TrainSettings, evaluate, train
    from offprincipal.training.monitor import Monitor, read_monitor
    from offprincipal.trajectories import Trajectory, trajectory

__version__ = version("offprincipal")

_HOMES = {
    "Comparison": "comparison",
    "CompareSettings": "comparison",
    "MatrixSettings": "comparison",
    "Monitor": "training.monitor",
    "adapt": "adapters",
    "apply_delta": "deltas",
    "compare": "comparison",
    "intervene": "interventions",
    "make_delta": "deltas",
    "measure_gates": "gates",
    "preflight": "forecast",
    "read_comparison": "comparison",
    "read_monitor": "training.monitor",
    "TrainSettings": "training",
    "Trajectory": "trajectories",
    "evaluate": "training",
    "train": "training",
    "trajectory": "trajectories",
    "undo": "interventions",
}

__all__ = [
    "CompareSettings",
    "Comparison",
    "MatrixSettings",
    "Monitor",
    "TrainSettings",
    "Trajectory",
    "adapt",
    "apply_delta",
    "compare",
    "evaluate",
    "intervene",
    "make_delta",
    "measure_gates",
    "preflight",
    "read_comparison",
    "read_monitor",
    "train",
    "trajectory",
    "undo",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'offprincipal' has no attribute '{name}'")
    return getattr(import_module(f"offprincipal.{_HOMES[name]}"), name)
