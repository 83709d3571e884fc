"""Run the work of a comparison: in threads of this process, or on a Ray cluster. The rows are the same.

Each tensor is measured on one core, because two matrices on two cores beat one on both, and so that the numbers do not
depend on how many there are.
"""

import os
import re
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from offprincipal.checkpoints import Part
from offprincipal.comparison.work import CompareSettings, Work
from offprincipal.errors import ArgumentError, OffPrincipalError, install_command
from offprincipal.measures.columns import needs_torch
from offprincipal.memory import return_freed_memory

_GIVE_BACK_AFTER = 16  # tensors
_ADDRESS = re.compile(r"(?:ray://)?(\[[0-9a-fA-F:]+\]|[\w.-]+):([0-9]{1,5})")
_ANSWERS = 10.0  # seconds
T = TypeVar("T")


def run_in_threads(
    work: Work, measure: Callable[[Any, Part], T], parts: Sequence[Part], threads: int, budget: int
) -> Iterator[tuple[Part, T]]:
    """Yield parts with their measurements as they finish, starting with the largest; the first error ends it.

    Args:
        measure: called with the work and a part.
        budget: bytes for the matrices being measured; one that needs more is measured alone.
    """
    needs = {part.name: work.bytes_needed(part) for part in parts}
    with one_core_each(needs_torch(work.settings.metrics)):
        yield from in_threads(partial(measure, work), parts, threads, needs, budget)


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


def run_on_ray(
    work: Work, measure: Callable[[Any, Part], T], parts: Sequence[Part], address: str
) -> Iterator[tuple[Part, T]]:
    """Yield parts with their measurements as workers of a Ray cluster finish them; Ray retries lost workers.

    Args:
        measure: called with a work like this one, opened on the worker, and a part; it must be importable there.
        address: address of a running cluster, or `local` for one on this machine. Its workers must see the same files.

    Raises:
        ArgumentError: Ray is not installed, or there is no such cluster.
    """
    ray = _ray()
    started = not ray.is_initialized()
    if started:
        _require_answer(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(
                address,  # `local` starts a new cluster here, whatever RAY_ADDRESS says
                include_dashboard=False if address == "local" else None,
                log_to_driver=False,
                logging_level="error",
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"no Ray cluster at '{address}': {error}. Start one, or use --ray local") from error
    try:
        remote = ray.remote(max_retries=3)(_measure_on_worker)
        made_of = (work.base, dict(work.tuned), work.settings, work.cache, dict(work.given_masters))
        shared = ray.put((measure, type(work), *made_of))
        waiting = {remote.remote(shared, part): part for part in parts}
        while waiting:
            done, _ = ray.wait(list(waiting))
            for reference in done:
                yield waiting.pop(reference), _result(ray, reference)
    finally:
        if started:
            ray.shutdown()


def _require_answer(address: str) -> None:
    """Check that an address accepts connections: Ray itself tries for minutes.

    Raises:
        ArgumentError: it does not within ten seconds, or it is not a valid address.
    """
    if address in ("local", "auto"):
        return
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ArgumentError(f"'{address}' is not a valid Ray address. Give [ray://]HOST:PORT, auto or local")
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=_ANSWERS).close()
    except OSError as error:
        reason = error.strerror or error
        raise ArgumentError(f"no Ray cluster at '{address}': {reason}. Start one, or use --ray local") from error


def _measure_on_worker(shared: tuple[Any, ...], part: Part) -> Any:
    measure, kind, base, tuned, settings, cache, masters = shared
    work = _opened(kind, base, tuple(tuned.items()), settings, cache, tuple(masters.items()))
    with one_core_each(needs_torch(work.settings.metrics)):
        return measure(work, part)


@lru_cache(maxsize=1)
def _opened(
    kind: type[Work],
    base: str,
    tuned: tuple[tuple[str, str], ...],
    settings: CompareSettings,
    cache: Path | None,
    masters: tuple[tuple[str, str], ...],
) -> Work:
    """The work, opened once per worker."""
    return kind(base, dict(tuned), settings, cache, dict(masters))


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ArgumentError(f"Ray is not installed: {install_command('ray')}, or omit --ray") from error
    return ray


def _result(ray: Any, reference: Any) -> Any:
    """The measurement, or the `OffPrincipalError` that the worker raised."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OffPrincipalError):
            raise error.cause from None
        raise


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
