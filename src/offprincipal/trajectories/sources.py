"""The checkpoints of a trajectory and their steps: from a run's root, branches on the Hub, or given one by one."""

import re
from collections.abc import Sequence
from pathlib import Path

from offprincipal.checkpoints import hub
from offprincipal.checkpoints.delta import SUFFIX
from offprincipal.errors import ArgumentError
from offprincipal.file_names import DELTAS, MASTERS, RECORD

_STEP = re.compile(r"(?:^|[-_=.@])(?:(?:checkpoint|global_step|step|iter|epoch)s?)?[-_=]?([0-9]{1,12})$")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".distcp", SUFFIX)
_ENDING = re.compile(r"\.(?:delta|safetensors|gguf|bin|pt|pth|ckpt)$")


def expanded(checkpoints: str | Path | Sequence[str | Path], notes: list[str] | None = None) -> list[str]:
    """The given checkpoints; for a run's root, those inside it in the order of their steps.

    Args:
        notes: receives a note about models in a run's root that are skipped.

    Raises:
        ArgumentError: there is none.
    """
    given = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    if len(given) == 1 and Path(given[0]).is_dir():
        root = _where_its_way_is(Path(given[0]))
        held = [path for path in root.iterdir() if not path.name.startswith(".") and path.name != MASTERS]
        inside = [
            path for path in held if (path.is_dir() or path.name.endswith(SUFFIX)) and _step_in(path.name) is not None
        ]
        if len(inside) > 1 or (inside and inside == held):
            left = sorted(path.name for path in held if path not in inside and _holds_weights(path))
            if left and notes is not None:
                notes.append(f"skipped, since their names have no step: {', '.join(left)} (list them with --steps)")
            return [str(path) for path in sorted(inside, key=lambda path: _step_in(path.name) or 0)]
    if not given:
        raise ArgumentError("no checkpoint is given: give at least one, or the run's folder")
    return [one for source in given for one in _revisions(str(source))]


def _where_its_way_is(run: Path) -> Path:
    """The folder of deltas in a run that `train` wrote; any other folder itself."""
    deltas = run / DELTAS
    return deltas if (run / RECORD).is_file() and deltas.is_dir() and any(deltas.glob(f"*{SUFFIX}")) else run


def _revisions(source: str) -> list[str]:
    """The revisions on the Hub that match `org/name@step_*`; a source that is not such a pattern stands for itself."""
    pattern = any(sign in source.partition("@")[2] for sign in "*?[")
    return hub.revisions(source) if pattern and not Path(source).exists() else [source]


def _holds_weights(path: Path) -> bool:
    return any(any(path.glob(f"*{ending}")) for ending in _WEIGHTS) if path.is_dir() else path.suffix in _WEIGHTS


def steps_of(
    sources: Sequence[str], steps: Sequence[float] | None = None, notes: list[str] | None = None
) -> list[tuple[str, float]]:
    """Checkpoints with their steps: as given, parsed from their names, or numbered if no name has a step.

    Step 0 is the model that the run started from, and is left out.

    Args:
        notes: receives notes about a skipped step 0, and about names without steps.

    Raises:
        ArgumentError: the number of steps differs from that of checkpoints, a step is not above 0, two are the same, or
            only some names have a step.

    >>> steps_of(["run/checkpoint-20", "run/checkpoint-0", "run/checkpoint-5"])
    [('run/checkpoint-20', 20.0), ('run/checkpoint-5', 5.0)]
    >>> steps_of(["a", "b"])
    [('a', 1.0), ('b', 2.0)]
    """
    said = [] if notes is None else notes
    if steps is None:
        told = {source: _step_in(source) for source in sources}
        known = {source: step for source, step in told.items() if step is not None}
        if known and len(known) < len(told):
            silent = next(source for source in told if source not in known)
            raise ArgumentError(
                f"cannot infer a step from '{silent}', though '{next(iter(known))}' has one. Pass --steps for all "
                "checkpoints, or omit it"
            )
        if not known:
            said.append(
                f"no name has a step: the {len(sources)} checkpoints are numbered 1 to {len(sources)} in the order "
                "given; pass --steps to set them"
            )
        if begun := [source for source, step in known.items() if step == 0]:
            said.append(f"{begun[0]} is step 0, the model that the run started from, and is left out")
        sources = [source for source in sources if told[source] != 0]
        steps = [known[source] for source in sources] if known else [float(i) for i in range(1, len(sources) + 1)]
    if not sources:
        raise ArgumentError("there is no checkpoint other than step 0: give at least one")
    if len(steps) != len(sources):
        raise ArgumentError(f"{len(steps)} steps are given for {len(sources)} checkpoints: give one for each")
    seen: dict[float, str] = {}
    for step, source in zip(steps, sources, strict=True):
        if not 0 < step < float("inf"):
            raise ArgumentError(f"step {step} of {source} is not above 0: step 0 is the base, which is given first")
        if step in seen:
            raise ArgumentError(
                f"{seen[step]} and {source} are both at step {label_of(step)}: omit one, or pass --steps"
            )
        seen[step] = source
    return [(source, float(step)) for source, step in zip(sources, steps, strict=True)]


def _step_in(source: str) -> float | None:
    """The number at the end of the last part of a path that has one: `run/global_step_20/actor` is at 20."""
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
