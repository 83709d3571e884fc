"""Compare a base with the checkpoints tuned from it: every metric beside its null, pooled, as tables."""

from offprincipal.comparison.comparison import compare, name_runs
from offprincipal.comparison.result import Comparison, Measured, Run, read_comparison
from offprincipal.comparison.tables import read_summary, read_table
from offprincipal.comparison.work import CompareSettings
from offprincipal.conditions import Condition, parse_condition
from offprincipal.measures.settings import MatrixSettings

__all__ = [
    "CompareSettings",
    "Comparison",
    "Condition",
    "MatrixSettings",
    "Measured",
    "Run",
    "compare",
    "name_runs",
    "parse_condition",
    "read_comparison",
    "read_summary",
    "read_table",
]
