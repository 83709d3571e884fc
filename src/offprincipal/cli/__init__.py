"""The command line. Arguments in, calls to the library, exit codes out; no logic of its own.

Exit codes: 0 done; 1 a bug in offprincipal; 2 bad input or arguments; 3 a `--fail-if` condition is true, or an
`--expect` or `--contract` expectation is broken; 130 interrupted.
"""

from offprincipal.cli import measure, train, view
from offprincipal.cli.common import app, main

__all__ = ["app", "main", "measure", "train", "view"]
