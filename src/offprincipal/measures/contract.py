"""A contract: what training may have done to which tensors, such as `model.visual.*: unchanged`, checked for each run.

A tensor that exists on only one side violates every expectation.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from offprincipal.errors import ArgumentError, FileError
from offprincipal.measures.columns import Group, metrics_of
from offprincipal.measures.conditions import Threshold, parse_threshold

_SHOWN = 5
_MOST_BYTES = 1 << 20

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Expectation:
    """An expectation of the tensors that match a pattern.

    Args:
        pattern: a shell-style pattern of names; the name of a module stands for all its tensors.
        expected: `unchanged`, `changed`, or a condition on a column of `matrices.parquet`.
        threshold: that condition; None for `unchanged` and `changed`.
    """

    pattern: str
    expected: str
    threshold: Threshold | None = None

    def __str__(self) -> str:
        return f"{self.pattern}: {self.expected}"

    def matches(self, name: str) -> bool:
        """Whether the pattern matches a tensor, or a part of one.

        >>> Expectation("lm_head", "unchanged").matches("lm_head.weight")
        True
        """
        return any(fnmatchcase(name, self.pattern + more) for more in ("", ".*", ":*", "[[]*"))

    def judge(self, rows: Sequence[Row], alone: Mapping[str, str], packed: Mapping[str, bool]) -> dict[str, Any]:
        """The entry of `summary.json` for one run.

        Args:
            rows: of `matrices.parquet`, that run's; alone: tensor -> why it was not compared; packed: tensors that hold
                no floating-point numbers -> whether their bits are the base's.
        """
        matched, broken = 0, []
        for row in rows:
            if self.matches(row["tensor"]) and row["numel"]:
                matched += 1
                wrong = self._wrong(row)
                broken += [] if wrong is None else [{"tensor": row["tensor"], "found": wrong}]
        for name, same in packed.items():
            if self.matches(name):
                matched += 1
                found = "unchanged" if same else "changed"
                held = same if self.threshold is not None else self.expected == found
                broken += [] if held else [{"tensor": name, "found": f"{found}; integers, compared bit for bit"}]
        for name, why in alone.items():
            if self.matches(name):
                matched += 1
                broken.append({"tensor": name, "found": why})
        entry = {"pattern": self.pattern, "expected": self.expected, "held": not broken}
        return entry | {"tensors": matched, "broken": broken}

    def _wrong(self, row: Row) -> str | None:
        """What happened to a tensor, if it violates the expectation; otherwise None."""
        if self.threshold is not None:
            value = row.get(self.threshold.metric)
            if self.threshold.held_by_value(value):
                return None
            return f"{self.threshold.metric} is {'undefined' if value is None else format(value, '.6g')}"
        stored = row["unchanged_fraction_stored"]
        unchanged = row["unchanged_fraction"] if stored is None else stored
        if (unchanged == 1) == (self.expected == "unchanged"):
            return None
        return "unchanged" if unchanged == 1 else f"{1 - unchanged:.4%} changed"


def parse_expectations(texts: Iterable[str], groups: tuple[Group, ...]) -> list[Expectation]:
    """Expectations from texts such as `*.mlp.*: changed` or `lm_head: unchanged_fraction > .9`.

    Args:
        groups: the metric groups that are measured.

    Raises:
        ArgumentError: a text is not an expectation, or its metric is not in these groups.

    >>> [str(each) for each in parse_expectations(["model.visual.*: unchanged"], ("changes",))]
    ['model.visual.*: unchanged']
    """
    columns = [column.name for metric in metrics_of(groups) for column in metric.columns]
    found = []
    for text in texts:
        pattern, _, expected = (part.strip() for part in str(text).rpartition(":"))
        if not pattern or not expected:
            raise ArgumentError(
                f"'{text}' is not a valid expectation. Write PATTERN: unchanged, PATTERN: changed, or PATTERN: METRIC "
                "> NUMBER"
            )
        threshold = None if expected in ("unchanged", "changed") else parse_threshold(expected, columns)
        found.append(Expectation(pattern, expected if threshold is None else str(threshold), threshold))
    return found


def read_contract(path: Path) -> list[str]:
    """The expectations in a YAML file: a mapping of pattern to expectation, or a list of texts.

    Raises:
        FileError: it cannot be read, or contains neither.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise FileError(f"cannot read the contract {path}: {error}") from error
    if isinstance(content, dict) and content:
        return [f"{pattern}: {expected}" for pattern, expected in content.items()]
    if isinstance(content, list) and content and all(isinstance(text, str) for text in content):
        return content
    raise FileError(f"{path} is not a contract: write a line such as `model.visual.*: unchanged` for each pattern")


def require_matches(expectations: Sequence[Expectation], names: Sequence[str]) -> None:
    """Check that every pattern matches a tensor.

    Raises:
        ArgumentError: a pattern matches none.
    """
    for expectation in expectations:
        if not any(map(expectation.matches, names)):
            shown = ", ".join(names[:_SHOWN])
            raise ArgumentError(f"'{expectation.pattern}' does not match any tensor: names are such as {shown}")


def broken_phrases(summary: Mapping[str, Any]) -> list[str]:
    """One phrase for each violated expectation, with the tensors that violate it."""
    found = []
    for run, entry in summary["runs"].items():
        for each in entry.get("contract", ()):
            if not each["held"]:
                tensors = [f"{one['tensor']} ({one['found']})" for one in each["broken"]]
                more = f" and {len(tensors) - _SHOWN} more" if len(tensors) > _SHOWN else ""
                count = f"{len(tensors)} of {each['tensors']} tensors"
                listed = f"{', '.join(tensors[:_SHOWN])}{more}"
                found.append(f"{run}: '{each['pattern']}' is not {each['expected']} in {count}: {listed}")
    return found
