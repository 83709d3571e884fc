"""Names of runs, and their sources as text: what a user gives, before anything is opened."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offprincipal.errors import ArgumentError

if TYPE_CHECKING:
    import torch

    Source = str | Path | torch.nn.Module


def name_runs(tuned: "Mapping[str, Source] | Sequence[Source]") -> dict[str, Any]:
    """Run -> source, a path as text; without a name it is that of its folder, or `model` for one in memory.

    Raises:
        ArgumentError: none is given, or two have one name.

    >>> name_runs(["runs/grpo", "runs/sft"])
    {'grpo': 'runs/grpo', 'sft': 'runs/sft'}
    """
    if isinstance(tuned, Mapping):
        named = [(name, as_source(source)) for name, source in tuned.items()]
    else:
        named = [(Path(s).resolve().name if isinstance(s, str | Path) else "model", as_source(s)) for s in tuned]
    named = [(name.encode("utf-8", "replace").decode(), source) for name, source in named]  # a folder's may be no text
    names = [name for name, _ in named]
    if not names:
        raise ArgumentError("no tuned checkpoint is given: give at least one")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ArgumentError(
            f"two runs are named '{repeated[0]}': distinguish them with NAME=PATH, in Python with a dict"
        )
    return dict(named)


def as_source(given: Any) -> Any:
    """A path as text, and a model in memory as it is."""
    return str(given) if isinstance(given, str | Path) else given
