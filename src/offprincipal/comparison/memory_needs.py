"""What measuring a matrix takes of memory.

The budget decides how many matrices are measured at once, never how: the numbers do not depend on it.
"""

from offprincipal.checkpoints import Part
from offprincipal.comparison.work import Work
from offprincipal.measures.columns import decomposes_base


def bytes_needed(work: Work, part: Part) -> int:
    """What measuring one tensor takes at most, beside what every comparison takes.

    Measured on matrices of 1 to 45 million entries (`benchmarks/RESULTS.md`, e), and rounded up.
    """
    if not work.is_linear(part) or work.settings.metrics == ("changes",):
        return 1 << 26  # read in blocks
    runs, masters = len(work.runs), len(work.masters)
    if decomposes_base(work.settings.metrics):
        entry, each = 48, 8
    elif "update" in work.settings.metrics:
        entry, each = 18, 8
    else:
        entry, each = 10, 6
    return part.numel * (entry + (each + 2) * runs + 12 * masters)
