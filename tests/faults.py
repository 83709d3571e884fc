"""How hard the tests of faults try, and what comes of one case: mutated inputs, kills, full disks."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from offprincipal.errors import OffPrincipalError

TIMES = int(os.environ.get("OFFPRINCIPAL_TIMES", "1"))


def times(usual: int) -> int:
    """As many cases as usual, times `OFFPRINCIPAL_TIMES`; the number seeds the draws too, so that they are others."""
    return usual * TIMES


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """By the clock, after which what runs hangs: raises `TimeoutError` in it."""

    def hangs(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(
    act: Callable[[], object],
    seconds: float = 60,
    work: float = float("inf"),
    refusal: type[OffPrincipalError] = OffPrincipalError,
) -> str:
    """'used', 'refused' by an error of ours, or what went wrong.

    Args:
        seconds: by the clock; work: seconds of this process's own time, which other processes do not lengthen.
    """
    began = time.process_time()
    try:
        with at_most(seconds):
            act()
    except refusal as error:
        return "refused" if str(error) else "refused without a word"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    took = time.process_time() - began
    return "used" if took < work else f"took {took:.1f} s"
