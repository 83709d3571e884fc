"""How much harder than usual the tests of faults try: mutated inputs, kills, full disks."""

import os

TIMES = int(os.environ.get("OFFPRINCIPAL_TIMES", "1"))


def times(usual: int) -> int:
    """As many cases as usual, times `OFFPRINCIPAL_TIMES`; the number seeds the draws too, so that they are others."""
    return usual * TIMES
