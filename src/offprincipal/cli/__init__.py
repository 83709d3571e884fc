"""The command line. Arguments in, calls to the library, exit codes out; no logic of its own.

Exit codes: 0 done; 1 a defect of ours; 2 bad input or arguments; 3 a `--fail-if` condition held, or a
contract did not; 130 interrupted.
"""

from offprincipal.cli import measure, train, view
from offprincipal.cli.common import app, main

__all__ = ["app", "main", "measure", "train", "view"]
