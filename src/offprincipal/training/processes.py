"""Work that only one of several processes may do, such as writing files; all processes get its result or error."""

import importlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

from offprincipal.checkpoints.matrices import whole
from offprincipal.errors import OffPrincipalError

T = TypeVar("T")
_PATIENCE = timedelta(hours=12)  # timeout while one process works and the others wait, as for a large model


def join(device: str) -> None:
    """Join the process group if a launcher such as `accelerate launch` or `torchrun` started several processes.

    Args:
        device: `auto`, `cpu` or `cuda`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not in_process_group():
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        importlib.import_module("accelerate").PartialState(cpu=on_cpu, timeout=_PATIENCE)


def processes() -> int:
    """The number of processes."""
    return torch.distributed.get_world_size() if in_process_group() else 1


def is_main() -> bool:
    """Whether this process is the first or the only one."""
    return processes() == 1 or torch.distributed.get_rank() == 0


def in_main(work: Callable[[], T]) -> T:
    """Call `work` in the first process only and return its result in every process; all processes must call this.

    Args:
        work: its result must be picklable if there are several processes.

    Raises:
        OffPrincipalError: `work` raised it; it is raised in every process.

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
    outcome: T = box[0]
    return outcome


def whole_state(model: Any) -> dict[str, torch.Tensor]:
    """The state dict of a model, sharded or not, on the CPU of the first process; all processes must call this.

    Args:
        model: a torch module.

    Returns:
        Name -> tensor in the first process; empty in the others.

    >>> list(whole_state(torch.nn.Linear(2, 1)))
    ['weight', 'bias']
    """
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        gathered = whole(tensor)  # one at a time
        if is_main():
            state[name] = gathered.cpu().contiguous()
    return state


def in_process_group() -> bool:
    """Whether torch's process group is initialised, with one process or several."""
    distributed: Any = torch.distributed
    return bool(distributed.is_available() and distributed.is_initialized())
