"""Measure the parts of checkpoints in threads, a core each and within a budget of memory, and put them in order."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

from threadpoolctl import threadpool_limits

from offprincipal.checkpoints import Part
from offprincipal.memory import return_freed_memory

_GIVE_BACK_AFTER = 16  # tensors
T = TypeVar("T")


def in_threads(
    measure: Callable[[Part], T], parts: Sequence[Part], threads: int, needs: Mapping[str, int], budget: int
) -> Iterator[tuple[Part, T]]:
    """Yield parts with their measurements as they finish, starting with the largest need; the first error ends it.

    Args:
        needs: part name -> bytes; budget: bytes for those being measured; one that needs more is measured alone.
    """
    waiting = sorted(parts, key=lambda part: -needs[part.name])
    in_flight: dict[Future[T], Part] = {}
    done = 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            while waiting or in_flight:
                left = budget - sum(needs[part.name] for part in in_flight.values())
                while len(in_flight) < threads and (part := _next(waiting, needs, left, alone=not in_flight)):
                    in_flight[pool.submit(measure, part)] = part
                    left -= needs[part.name]
                for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
                    yield in_flight.pop(future), future.result()
                    done += 1
                    if done % _GIVE_BACK_AFTER == 0:
                        return_freed_memory()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _next(waiting: list[Part], needs: Mapping[str, int], left: int, alone: bool) -> Part | None:
    """Remove and return the largest waiting part that fits into what is left, or the largest if nothing else runs."""
    for place, part in enumerate(waiting):
        if alone or needs[part.name] <= left:
            return waiting.pop(place)
    return None


def in_order(parts: Sequence[Part], found: Iterable[tuple[Part, T]]) -> Iterator[tuple[Part, T]]:
    """Reorder measurements to the order of the parts, so that sums do not depend on the order in which they finish."""
    early: dict[str, T] = {}
    left = deque(parts)
    for part, measured in found:
        early[part.name] = measured
        while left and left[0].name in early:
            yield left[0], early.pop(left.popleft().name)


@contextmanager
def one_core_each(with_torch: bool = True) -> Iterator[None]:
    """Hold numpy's BLAS and torch to one thread, and torch to full float32.

    Left to itself, numpy's would start a thread a core for every small product of every worker. Where nothing is
    decomposed, `with_torch` being false, torch is not even imported.
    """
    with threadpool_limits(1, user_api="blas"):
        if not with_torch and "torch" not in sys.modules:
            yield
            return
        import torch

        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
