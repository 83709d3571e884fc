"""AdamW on a mask: moments, and float32 masters of half-precision weights, are kept for the active entries alone.

An entry outside its mask is never written, by the step or by weight decay. Knows nothing of how masks are chosen.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from offprincipal.adapters.choosing import require_trainable_type
from offprincipal.adapters.given import require_number, unwrapped
from offprincipal.adapters.sparse_index import blocks_of, count_active, entries_of, index_of
from offprincipal.adapters.sparse_shards import gathered, spread
from offprincipal.checkpoints.roles import WRAPPERS
from offprincipal.errors import AdapterError

_OWN = ("exp_avg", "exp_avg_sq", "index", "master")  # of the types given here, whatever the parameter's

Named = Iterable[tuple[str, Tensor]]


class SparseAdamW(Optimizer):
    """AdamW that trains, and keeps state for, the masked entries of parameters; all else stays as it is, bit for bit.

    Each active entry moves exactly as under `torch.optim.AdamW(foreach=False)`, bit for bit, by torch's own operations
    on gathered entries, on any device. Gradients are clipped, if at all, by whoever calls: the norm of
    `clip_grad_norm_` counts inactive entries, as it does for a dense optimizer. `zero_grad` clears the gradients of
    masked parameters alone: call `masks.freeze_others(model)` first, or `model.zero_grad()` in its place.

    Under FSDP2, by hand or by accelerate, each process keeps the mask and the state of its own shard. In a `state_dict`
    these become tensors of the parameter's shape, sharded as it is, which `torch.distributed.checkpoint` saves, and
    loads at any number of processes.

    Half-precision weights have float32 masters. A weight that something else wrote, as loading does, is the truth: its
    master is taken from it at the next step.

    Args:
        params: a module or its `named_parameters()`, compiled or wrapped too, or groups whose `params` are such pairs.
            Parameters without a mask are left out, and stay as they are.
        masks: parameter name -> bool tensor of its shape: `Masks`, or any mapping.
        lr, betas, eps, weight_decay: as of `torch.optim.AdamW`.

    Attributes:
        state: for each parameter `step`; `exp_avg` and `exp_avg_sq`, float32, one entry for each active one; `index`,
            the active entries as 16-bit offsets, or as bits where more than 1/16 are active (`sparse_index`);
            `master`, float32, for bfloat16 and float16.

    Raises:
        AdapterError: parameters come without names, a mask names no parameter or has another shape, a weight is
            quantised, or a setting is out of range.

    Source: Loshchilov and Hutter, arXiv 1711.05101.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> masks = {"weight": torch.tensor([[True, False]])}
    >>> optimizer = SparseAdamW(model.named_parameters(), masks, lr=0.25, weight_decay=0.0)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> model.weight.tolist()
    [[0.75, 1.0]]
    """

    def __init__(
        self,
        params: torch.nn.Module | Named | Iterable[dict[str, Any]],
        masks: Mapping[str, Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        require_settings(lr, betas, eps, weight_decay)
        if not isinstance(masks, Mapping):
            raise AdapterError(f"masks are a {type(masks).__name__}: make_masks makes them, Masks.load reads a file")
        self._masks = masks
        groups = _masked_groups(params, masks)
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer; of named parameters, of which those without a mask are left out.

        Raises:
            AdapterError: its parameters have no names, or none has a mask.
        """
        if "param_names" not in param_group:
            (param_group,) = _groups_of([param_group], self._masks) or [{"params": []}]
            if not param_group["params"]:
                raise AdapterError("no parameter of the group has a mask, so that nothing of it would be trained")
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move the active entries of every parameter that has a gradient.

        Raises:
            AdapterError: a gradient is sparse, or parameters were replaced after the optimizer had stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise AdapterError(f"the gradient of {name} is a sparse tensor: SparseAdamW takes dense gradients")
                state = self.state[parameter]
                if not state:
                    self._forget_replaced_parameters()
                    state.update(_fresh_state(_local(parameter), self._index(name, parameter)))
                _step(_local(parameter), _local(parameter.grad), state, group)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer: plain tensors and numbers, the masks included; sharded tensors where parameters are."""
        self._forget_replaced_parameters()
        for name, parameter in self._named():
            if not self.state[parameter]:
                self.state[parameter].update(_fresh_state(_local(parameter), self._index(name, parameter)))
        found = super().state_dict()
        ids = [i for group in found["param_groups"] for i in group["params"]]
        for i, (_, parameter) in zip(ids, self._named(), strict=True):
            if isinstance(parameter, DTensor):
                found["state"][i] = spread(self.state[parameter], parameter)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where another optimizer with the same masks stopped; also in an optimizer that has not stepped.

        Raises:
            AdapterError: that one had other masks, parameters, types of weights or shards, or was not a SparseAdamW.
        """
        self._forget_replaced_parameters()
        named = list(self._named())
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        if len(ids) != len(named):
            raise AdapterError(
                f"the saved optimizer trained {len(ids)} parameters, this one {len(named)}: continue with the masks "
                "that it was started with"
            )
        saved: dict[Any, dict[str, Any]] = {}
        for i, (name, parameter) in zip(ids, named, strict=True):
            index = self._index(name, parameter)
            if i in state_dict["state"]:
                saved[i] = gathered(state_dict["state"][i], name, _local(parameter).shape)
                _require_own(saved[i], name, parameter)
                if not torch.equal(saved[i]["index"].cpu(), index.cpu()):
                    raise AdapterError(
                        f"the saved optimizer trained other entries of {name}: continue with the masks it was started "
                        "with"
                    )
        super().load_state_dict({**state_dict, "state": saved})
        for i, (_, parameter) in zip(ids, named, strict=True):  # torch casts state to the parameter's type
            if i in saved:
                self.state[parameter]["step"] = self.state[parameter]["step"].clone()
                for key in saved[i].keys() & set(_OWN):
                    self.state[parameter][key] = saved[i][key].to(_local(parameter).device, copy=True)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.param_groups:
            yield from zip(group["param_names"], group["params"], strict=True)

    def _forget_replaced_parameters(self) -> None:
        """Of parameters that sharding has put others in place of, as accelerate does, before the first step."""
        present = {id(parameter) for _, parameter in self._named()}
        for parameter in [parameter for parameter in self.state if id(parameter) not in present]:
            if self.state[parameter].get("step", 0) > 0:
                raise AdapterError(
                    "parameters of SparseAdamW were replaced after it had stepped, so their moments are lost: shard "
                    "the model, or call accelerator.prepare, before the first step"
                )
            del self.state[parameter]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_masks": self._masks}

    def _index(self, name: str, parameter: Tensor) -> Tensor:
        """The active entries of a parameter, or of this process's shard; a collective call where it is sharded."""
        mask = self._masks[name].to(parameter.device)
        if isinstance(parameter, DTensor):
            shards = distribute_tensor(mask.to(torch.uint8), parameter.device_mesh, parameter.placements)
            mask = shards.to_local().bool()
        return index_of(mask)


def _fresh_state(parameter: Tensor, index: Tensor) -> dict[str, Tensor]:
    """Moments of zero, and masters equal to the weights where these are of half precision."""
    active = count_active(index, parameter.numel())
    kind = _wide(parameter)
    state = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros(active, dtype=kind, device=parameter.device),
        "exp_avg_sq": torch.zeros(active, dtype=kind, device=parameter.device),
        "index": index,
    }
    if parameter.dtype != kind:
        state["master"] = parameter.detach().reshape(-1)[entries_of(index, parameter.numel())].to(kind)
    return state


def _step(parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """torch's own AdamW on the active entries, some of them at a time."""
    weights, gradients = parameter.detach().view(-1), grad.reshape(-1)
    first = 0
    for entries in blocks_of(state["index"], parameter.numel()):
        here = slice(first, first := first + len(entries))
        values = weights[entries]
        if "master" in state:
            values = _followed(state["master"][here], values)
        adamw(
            [values],
            [gradients[entries].to(values.dtype)],
            [state["exp_avg"][here]],
            [state["exp_avg_sq"][here]],
            [],
            [state["step"].clone()],  # which it raises by one
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        weights[entries] = values.to(weights.dtype)
    state["step"] += 1


def _followed(masters: Tensor, stored: Tensor) -> Tensor:
    """The masters, taken anew where the stored weight is not the master, rounded: something else wrote it."""
    return masters.copy_(torch.where(masters.to(stored.dtype) == stored, masters, stored.to(masters.dtype)))


def _wide(parameter: Tensor) -> torch.dtype:
    """What moments and masters are kept in."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _require_own(saved: Mapping[str, Tensor], name: str, parameter: Tensor) -> None:
    """Raises AdapterError where a saved state is not that of a parameter of this type under a mask."""
    if not {"step", "exp_avg", "exp_avg_sq", "index"} <= saved.keys():
        raise AdapterError(f"the saved state of {name} is of another optimizer: give the state of a SparseAdamW")
    halves = parameter.dtype != _wide(parameter)
    if saved["exp_avg"].dtype != _wide(parameter) or ("master" in saved) != halves:
        raise AdapterError(
            f"the saved state of {name} is of weights of another type than {parameter.dtype}: open the model in the "
            "type that it was trained in"
        )


def _masked_groups(
    params: torch.nn.Module | Named | Iterable[dict[str, Any]], masks: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Groups of those parameters that have a mask, with their names; every mask has one."""
    is_model = isinstance(params, torch.nn.Module) or not isinstance(params, Iterable)
    given: list[Any] = list(unwrapped(params).named_parameters() if is_model else cast("Iterable[Any]", params))
    in_groups = bool(given) and isinstance(given[0], dict)
    found = _groups_of(given if in_groups else [{"params": given}], masks)
    seen = {name for group in found for name, _ in group["params"]}
    absent = [name for name in masks if name not in seen]
    if not masks:
        raise AdapterError("there is no mask, so that nothing would be trained: make_masks makes them")
    if absent and in_groups:
        raise AdapterError(
            f"{len(absent)} parameters that have a mask are in no group, the first {absent[0]}: put them into one, or "
            "leave their masks out"
        )
    if absent:
        raise AdapterError(
            f"{len(absent)} masks name no parameter, the first {absent[0]}: give masks made from this model, by the "
            "names that its named_parameters() have"
        )
    return found


def _groups_of(groups: Iterable[dict[str, Any]], masks: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    groups = [{**group, "params": list(group["params"])} for group in groups]
    pairs = [pair for group in groups for pair in group["params"]]
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise AdapterError(
            "SparseAdamW finds masks by name: give the model or its named_parameters(), not model.parameters()"
        )
    parallel = all(name.startswith("module.") for name, _ in pairs)  # so DistributedDataParallel names them
    found = []
    for group in groups:
        chosen = []
        for given, parameter in group["params"]:
            plain = WRAPPERS.sub("", given)
            names = (given, plain, plain.removeprefix("module.") if parallel else plain)
            name = next((name for name in names if name in masks), None)
            if name is not None:
                _require_fit(name, parameter, masks[name])
                chosen.append((name, parameter))
        if chosen:
            found.append({**group, "params": chosen})
    return found


def _require_fit(name: str, parameter: Tensor, mask: Tensor) -> None:
    require_trainable_type(name, parameter)
    if mask.dtype != torch.bool or mask.shape != parameter.shape:
        raise AdapterError(
            f"the mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}, the parameter has shape "
            f"{tuple(parameter.shape)}: give a bool tensor of that shape"
        )
    if not _local(parameter).is_contiguous():
        raise AdapterError(f"{name} is not contiguous in memory: make it so before it is trained under a mask")


def require_settings(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Check settings of AdamW.

    Raises:
        AdapterError: one is out of range.
    """
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not (math.isfinite(require_number(name, value)) and value >= 0):
            raise AdapterError(f"{name} is {value}: give a number from 0 up")
    pair = isinstance(betas, Sequence) and not isinstance(betas, str) and len(betas) == 2
    if not (pair and all(0 <= require_number("a beta", beta) < 1 for beta in betas)):
        raise AdapterError(f"betas are {betas}: give two numbers from 0, below 1")


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
