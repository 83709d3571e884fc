"""One process of several does what only one should; all see its result, or its error."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from offprincipal.errors import OffPrincipalError

T = TypeVar("T")


def is_main() -> bool:
    """Whether this process is the first, or the only one."""
    return not _several() or torch.distributed.get_rank() == 0


def in_main(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, in every process; all of them call this together.

    Raises:
        OffPrincipalError: what `work` raised there.

    >>> in_main(lambda: 3)
    3
    """
    if not _several():
        return work()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box = [work(), None]
        except OffPrincipalError as error:
            box = [None, error]
    torch.distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    found: T = box[0]
    return found


def in_process_group() -> bool:
    """Whether torch's process group is there, of one process or several."""
    distributed: Any = torch.distributed
    return bool(distributed.is_available() and distributed.is_initialized())


def _several() -> bool:
    return in_process_group() and torch.distributed.get_world_size() > 1
