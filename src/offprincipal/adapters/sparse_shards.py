"""The state of a shard of a sparsely trained parameter, as sharded checkpoints keep it: of the parameter's shape.

How many entries are active differs from shard to shard, which no sharded tensor can say; dense ones it can, so that
`torch.distributed.checkpoint` saves each entry once and loads it at any number of processes. They exist only while a
state dict does. Knows nothing of the optimizer.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from offprincipal.adapters.sparse_index import entries_of, index_of
from offprincipal.errors import AdapterError

_OF_ACTIVE_ENTRIES = ("exp_avg", "exp_avg_sq", "master")


def spread(state: Mapping[str, Tensor], parameter: DTensor) -> dict[str, Tensor]:
    """State of the active entries of this process's shard, as tensors sharded as the parameter is.

    Returns:
        the same keys: what belongs to active entries is zero elsewhere, `index` is 1 where an entry is active, uint8;
        what belongs to none is as it was.
    """
    local = parameter.to_local()
    entries = entries_of(state["index"], local.numel())

    def dense(values: Tensor) -> Tensor:
        whole = values.new_zeros(local.numel())
        whole[entries] = values
        return DTensor.from_local(
            whole.view(local.shape),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    found = {key: dense(value) if key in _OF_ACTIVE_ENTRIES else value for key, value in state.items()}
    return found | {"index": dense(torch.ones(len(entries), dtype=torch.uint8, device=local.device))}


def gathered(state: Mapping[str, Tensor], name: str, shape: torch.Size) -> dict[str, Tensor]:
    """State as `spread` gives it, or whole as a full state dict holds it, of the active entries alone again.

    Args:
        name: of the parameter. shape: of this process's shard of it.

    Returns:
        the same keys; state that was not spread is as it was.

    Raises:
        AdapterError: it is of another shard.
    """
    if "index" not in state or state["index"].dtype != torch.uint8:
        return dict(state)
    local = {key: value.to_local() if isinstance(value, DTensor) else value for key, value in state.items()}
    if local["index"].shape != shape:
        raise AdapterError(
            f"the saved state of {name} has shape {tuple(local['index'].shape)}, this process's shard {tuple(shape)}: "
            "load it by torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
    mask = local["index"].bool()
    active = {key: local[key][mask] for key in _OF_ACTIVE_ENTRIES if key in local}
    return local | active | {"index": index_of(mask)}
