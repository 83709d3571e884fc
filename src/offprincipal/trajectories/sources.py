"""Which checkpoints a trajectory is of, and at which steps: a run's root, branches on the Hub, or as they are named."""

import re
from collections.abc import Sequence
from pathlib import Path

from offprincipal.checkpoints import hub
from offprincipal.checkpoints.delta import SUFFIX
from offprincipal.errors import ArgumentError

_STEP = re.compile(r"(?:^|[-_=.@])(?:checkpoint|global_step|step|iter|epoch)?s?[-_=]?([0-9]{1,12})$")
_ENDING = re.compile(r"\.(?:delta|safetensors|gguf|bin|pt|pth|ckpt)$")


def expanded(checkpoints: str | Path | Sequence[str | Path]) -> list[str]:
    """The checkpoints that are named; those inside of a run's root, in the order of their steps.

    Raises:
        ArgumentError: there is none.
    """
    given = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    if len(given) == 1 and Path(given[0]).is_dir():
        held = [path for path in Path(given[0]).iterdir() if not path.name.startswith(".")]
        inside = [
            path for path in held if (path.is_dir() or path.name.endswith(SUFFIX)) and _step_in(path.name) is not None
        ]
        if len(inside) > 1 or (inside and inside == held):
            return [str(path) for path in sorted(inside, key=lambda path: _step_in(path.name) or 0)]
    if not given:
        raise ArgumentError("no checkpoint given: name at least one, or the run's folder")
    return [one for source in given for one in _revisions(str(source))]


def _revisions(source: str) -> list[str]:
    """The revisions on the Hub that `org/name@step_*` names; what is no such pattern names itself."""
    pattern = any(sign in source.partition("@")[2] for sign in "*?[")
    return hub.revisions(source) if pattern and not Path(source).exists() else [source]


def steps_of(sources: Sequence[str], steps: Sequence[float] | None = None) -> list[float]:
    """The step of each checkpoint: as given, as its name tells, or its place where the names do not tell.

    Raises:
        ArgumentError: there are not as many, one is not above 0, or two are the same.

    >>> steps_of(["run/checkpoint-20", "run/checkpoint-5"]), steps_of(["a", "b"])
    ([20.0, 5.0], [1.0, 2.0])
    """
    if steps is None:
        told = [_step_in(source) for source in sources]
        known = [step for step in told if step is not None and step > 0]
        steps = known if len(known) == len(sources) else [float(i) for i in range(1, len(sources) + 1)]
    if len(steps) != len(sources):
        raise ArgumentError(f"{len(steps)} steps are given for {len(sources)} checkpoints: give one for each")
    seen: dict[float, str] = {}
    for step, source in zip(steps, sources, strict=True):
        if not 0 < step < float("inf"):
            raise ArgumentError(f"step {step} of {source} is not above 0: the base is at 0, and is given first")
        if step in seen:
            raise ArgumentError(
                f"{seen[step]} and {source} are both at step {label_of(step)}: leave one out, or give --steps"
            )
        seen[step] = source
    return [float(step) for step in steps]


def _step_in(source: str) -> float | None:
    """The number that a name ends with, of the last part that has one: `run/global_step_20/actor` is at 20."""
    for name in reversed(re.split(r"[/\\]", source.rstrip("/\\"))):
        found = _STEP.search(_ENDING.sub("", name))
        if found:
            return float(found[1])
    return None


def label_of(step: float) -> str:
    """A step as text, with all its digits and no more.

    >>> label_of(20.0), label_of(0.5)
    ('20', '0.5')
    """
    return str(int(step)) if step == int(step) else repr(step)
