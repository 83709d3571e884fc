"""Convert the state of `SparseAdamW` on a sharded parameter between compact tensors and tensors of its shape.

Shards differ in their numbers of active entries, so the compact state cannot be a sharded tensor. Tensors of the
parameter's shape can: `torch.distributed.checkpoint` saves each entry once, and loads with any number of processes.
They exist only in a state dict. Knows nothing of the optimizer.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from offprincipal.adapters.sparse_index import entries_of, index_of
from offprincipal.errors import AdapterError

_OF_ACTIVE_ENTRIES = ("exp_avg", "exp_avg_sq", "master")


def spread(state: Mapping[str, Tensor], parameter: DTensor) -> dict[str, Tensor]:
    """The state of this process's shard as tensors sharded like the parameter.

    Args:
        state: key -> tensor, as `SparseAdamW` keeps it.
        parameter: the sharded parameter.

    Returns:
        The same keys. `exp_avg`, `exp_avg_sq` and `master` have the parameter's shape and are zero at inactive entries;
        `index` has it too, uint8, 1 at active entries. Other state, such as `step`, is unchanged.
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

    whole_state = {key: dense(value) if key in _OF_ACTIVE_ENTRIES else value for key, value in state.items()}
    return whole_state | {"index": dense(torch.ones(len(entries), dtype=torch.uint8, device=local.device))}


def gathered(state: Mapping[str, Tensor], name: str, shape: torch.Size) -> dict[str, Tensor]:
    """The inverse of `spread`: state of the parameter's shape, sharded or whole, as compact state of active entries.

    Args:
        state: key -> tensor, as `spread` returns it, or with whole tensors, as a full state dict holds it.
        name: of the parameter, for error messages.
        shape: of this process's shard.

    Returns:
        The same keys. State that is compact already is returned as it is.

    Raises:
        AdapterError: the state has the shape of another shard.

    >>> mask = torch.tensor([[1, 0], [0, 1]], dtype=torch.uint8)
    >>> state = {"exp_avg": torch.tensor([[0.5, 0.0], [0.0, 2.0]]), "index": mask}
    >>> gathered(state, "weight", torch.Size([2, 2]))["exp_avg"]
    tensor([0.5000, 2.0000])
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
