"""Send a finished comparison to an experiment tracker: a tracker run for each run, with pooled figures as scalars.

Training runs use the Trainer's own `report_to`; this is for comparisons. Paths are shortened by `without_paths`.
"""

import re
import shlex
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from offprincipal.errors import ArgumentError, FileError
from offprincipal.reports.places import without_paths

PROJECT = "offprincipal"


def report_comparison(summary: Mapping[str, Any], to: str, out: Path, project: str = PROJECT) -> str:
    """Send every run's pooled figures to a tracker.

    Args:
        summary: the content of `summary.json`.
        to: `tensorboard`, `trackio` or `wandb`; it must be installed.
        out: folder of the comparison; TensorBoard's files go into its subfolder `tensorboard`.
        project: name of the group of runs in trackio and wandb.

    Returns:
        A text that says where the figures are.

    Raises:
        ArgumentError: the tracker is unknown or not installed.
        FileError: the tracker reported an error.
    """
    require_tracker(to)
    try:
        return TRACKERS[to](without_paths(dict(summary)), out, project)
    except Exception as error:  # any error of a tracker: no account, no network, a full disk
        again = shlex.join(["offprincipal", "report", str(out), "--report-to", to])
        raise FileError(
            f"{to} did not accept the comparison, which is written: {str(error).rstrip('.')}. Try again by {again}"
        ) from error


def require_tracker(name: str) -> None:
    """Check that a tracker is known and installed.

    Raises:
        ArgumentError: it is not.
    """
    if name not in TRACKERS:
        raise ArgumentError(f"no tracker '{name}': choose one of {', '.join(TRACKERS)}")
    spec = find_spec(name)
    if spec is None or spec.origin is None:  # a plain folder of that name, such as W&B creates, is not a package
        raise ArgumentError(f"{name} is not installed: pip install {name}, or leave --report-to out")


def scalars_of(run: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one run by name, with the ends of their intervals; undefined values are left out.

    >>> scalars_of({"metrics": {"rate": {"value": 0.5, "low": 0.4, "high": None}}, "anatomy": None})
    {'rate': 0.5, 'rate/low': 0.4}
    """
    scalars: dict[str, float] = {}
    for name, pooled in run["metrics"].items():
        values = {name: pooled["value"], f"{name}/low": pooled.get("low"), f"{name}/high": pooled.get("high")}
        scalars |= {key: float(value) for key, value in values.items() if value is not None}
    return scalars


def _to_tensorboard(summary: dict[str, Any], out: Path, project: str) -> str:
    writer: Any = import_module("torch.utils.tensorboard").SummaryWriter
    taken: set[str] = set()
    for name, run in summary["runs"].items():
        folder_name = re.sub(r"[^\w-]", "_", name)  # so that names cannot form paths
        while folder_name in taken:
            folder_name += "_"
        taken.add(folder_name)
        folder = out / "tensorboard" / folder_name
        with writer(str(folder)) as events:
            events.add_text("comparison", f"{run['source']} with {summary['base']}")
            for key, value in scalars_of(run).items():
                events.add_scalar(key, value, 0)
    return f"tensorboard --logdir {out / 'tensorboard'}"


def _to_wandbs_interface(package: str) -> Callable[[dict[str, Any], Path, str], str]:
    """A function that sends figures to W&B, or to trackio, which has the same interface."""

    def send(summary: dict[str, Any], out: Path, project: str) -> str:
        tracker = import_module(package)
        for name, run in summary["runs"].items():
            about = {"base": summary["base"], "tuned": run["source"], **summary["arguments"]}
            tracker.init(project=project, name=name, config=about)
            tracker.log(scalars_of(run))
            tracker.finish()
        return f"project {project} of {package}"

    return send


TRACKERS = {
    "tensorboard": _to_tensorboard,
    "trackio": _to_wandbs_interface("trackio"),
    "wandb": _to_wandbs_interface("wandb"),
}
