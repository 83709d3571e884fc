"""Run the work of a comparison: in threads of this process, or on a Ray cluster. The rows are the same.

Each tensor is measured on one core, because two matrices on two cores beat one on both, and so that the numbers do not
depend on how many there are.
"""

import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from offprincipal.checkpoints import Part
from offprincipal.comparison.work import Work
from offprincipal.errors import ArgumentError, OffPrincipalError, install_command
from offprincipal.measures.columns import needs_torch
from offprincipal.measures.compare_settings import CompareSettings
from offprincipal.parallel import in_threads, one_core_each

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
