"""The record of a training run, `run.json`, as `train` returns it."""

from typing import Any

import pyarrow as pa

from offprincipal.tabular import Tabular, first_of

_FIGURES = ("greedy_accuracy", "sampled_accuracy", "pass_at_k", "token_entropy", "kl_to_base")


class RunRecord(Tabular, dict[str, Any]):
    """The content of `run.json`; its table is the log, an entry a step, its text the held-out figures.

    >>> record = RunRecord(settings={"recipe": "sft", "tasks": ["add"], "steps": 2}, log=[{"step": 1, "loss": 0.5}])
    >>> record["settings"]["steps"], record.to_arrow().column_names
    (2, ['step', 'loss'])
    """

    def to_arrow(self, table: str = "") -> pa.Table:
        """The log: a row a step, a column for everything that any step logged."""
        names = dict.fromkeys(name for entry in self["log"] for name in entry)
        return pa.Table.from_pylist([{name: entry.get(name) for name in names} for entry in self["log"]])

    def _shown(self) -> Any:
        from rich.console import Group

        settings, log = self["settings"], self["log"]
        said = f"{settings['recipe']} on {', '.join(settings['tasks'])}: {len(log)} of {settings['steps']} steps"
        said += f", stopped early: {self['stopped']}" if self.get("stopped") else ""
        before, after = ((self.get("accuracy") or {}).get(when) or {} for when in ("before", "after"))
        rows = [
            {"held out": name, "before": before.get(name), "after": after.get(name)}
            for name in _FIGURES
            if name in before or name in after
        ]
        return Group(said, first_of(pa.Table.from_pylist(rows))) if rows else Group(said)
