"""A finished comparison in an experiment tracker: a run each, its pooled figures as scalars beside their nulls.

Training runs report through the Trainer's own `report_to`; this is for what is measured afterwards. Places on this
machine are named as in the page that is made to be shared.
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
        summary: as `summary.json` has it. to: `tensorboard`, `trackio` or `wandb`, which has to be installed.
        out: folder of the comparison; TensorBoard's files go into its `tensorboard`.
        project: as trackio and wandb call a group of runs.

    Returns:
        Where they are, in words.

    Raises:
        ArgumentError: there is no such tracker, or it is not installed.
        FileError: it did not take them.
    """
    require_tracker(to)
    try:
        return TRACKERS[to](without_paths(dict(summary)), out, project)
    except Exception as error:  # whatever a tracker of others raises: no account, no network, a full disk
        again = shlex.join(["offprincipal", "report", str(out), "--report-to", to])
        raise FileError(
            f"{to} did not take the comparison, which is whole: {str(error).rstrip('.')}. Try again by {again}"
        ) from error


def require_tracker(name: str) -> None:
    """Check that there is such a tracker, and that it is installed.

    Raises:
        ArgumentError: there is none, or it is not.
    """
    if name not in TRACKERS:
        raise ArgumentError(f"no tracker '{name}': choose one of {', '.join(TRACKERS)}")
    spec = find_spec(name)
    if spec is None or spec.origin is None:  # a folder of that name, such as W&B leaves behind, is no package
        raise ArgumentError(f"{name} is not installed: pip install {name}, or leave --report-to out")


def scalars_of(run: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one run, by name, with the ends of their intervals; undefined ones are left out.

    >>> scalars_of({"metrics": {"rate": {"value": 0.5, "low": 0.4, "high": None}}, "anatomy": None})
    {'rate': 0.5, 'rate/low': 0.4}
    """
    found: dict[str, float] = {}
    for name, pooled in run["metrics"].items():
        values = {name: pooled["value"], f"{name}/low": pooled.get("low"), f"{name}/high": pooled.get("high")}
        found |= {key: float(value) for key, value in values.items() if value is not None}
    return found


def _to_tensorboard(summary: dict[str, Any], out: Path, project: str) -> str:
    writer: Any = import_module("torch.utils.tensorboard").SummaryWriter
    taken: set[str] = set()
    for name, run in summary["runs"].items():
        folder_name = re.sub(r"[^\w-]", "_", name)  # no path out of it
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
    """Of W&B, and of trackio, which has the same."""

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
