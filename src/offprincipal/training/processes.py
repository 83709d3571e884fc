"""One process of several does what only one should; all see its result, or its error."""

import importlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

from offprincipal.checkpoints.matrices import whole
from offprincipal.errors import OffPrincipalError

T = TypeVar("T")
_PATIENCE = timedelta(hours=12)  # for what one process does while the others wait, as measuring a large model


def join(device: str) -> None:
    """Enter the process group of a launcher such as `accelerate launch` or `torchrun`, if it started several of us.

    Args:
        device: as the settings have it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not in_process_group():
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        importlib.import_module("accelerate").PartialState(cpu=on_cpu, timeout=_PATIENCE)


def processes() -> int:
    """How many there are."""
    return torch.distributed.get_world_size() if in_process_group() else 1


def is_main() -> bool:
    """Whether this process is the first, or the only one."""
    return processes() == 1 or torch.distributed.get_rank() == 0


def in_main(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, in every process; all of them call this together.

    Raises:
        OffPrincipalError: what `work` raised there.

    >>> in_main(lambda: 3)
    3
    """
    if processes() == 1:
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


def whole_state(model: Any) -> dict[str, torch.Tensor]:
    """What a model holds, sharded or not, on the CPU of the first process; empty in the others, all of which call this.

    >>> list(whole_state(torch.nn.Linear(2, 1)))
    ['weight', 'bias']
    """
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        gathered = whole(tensor)  # one at a time
        if is_main():
            found[name] = gathered.cpu().contiguous()
    return found


def in_process_group() -> bool:
    """Whether torch's process group is there, of one process or several."""
    distributed: Any = torch.distributed
    return bool(distributed.is_available() and distributed.is_initialized())
