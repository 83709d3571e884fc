"""Compare a base with the checkpoints tuned from it: every metric beside its null, pooled, as tables."""

from offprincipal.comparison.comparison import compare
from offprincipal.comparison.result import Comparison, Measured, Run, read_comparison
from offprincipal.measures.compare_settings import CompareSettings
from offprincipal.measures.conditions import Condition, parse_condition
from offprincipal.measures.settings import MatrixSettings
from offprincipal.tables import read_summary, read_table

__all__ = [
    "CompareSettings",
    "Comparison",
    "Condition",
    "MatrixSettings",
    "Measured",
    "Run",
    "compare",
    "parse_condition",
    "read_comparison",
    "read_summary",
    "read_table",
]
