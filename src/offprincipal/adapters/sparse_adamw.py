"""AdamW under a mask: moments, and float32 masters of half-precision weights, exist only for the active entries.

Active entries are those that the mask allows to be trained. Other entries are never written, neither by a step nor by
weight decay. Knows nothing of how masks are chosen.
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

_OWN = ("exp_avg", "exp_avg_sq", "index", "master")  # state whose dtype does not follow the parameter's

Named = Iterable[tuple[str, Tensor]]


class SparseAdamW(Optimizer):
    """AdamW that trains only the masked entries of parameters; all other entries stay bit-identical.

    Each active entry is updated bit for bit as by `torch.optim.AdamW(foreach=False)`, by torch's own operations on the
    gathered entries, on any device. Gradients are not clipped here; the norm that `clip_grad_norm_` computes includes
    inactive entries, as it does for a dense optimizer. `zero_grad` clears only the gradients of masked parameters: call
    `masks.freeze_others(model)` first, or use `model.zero_grad()` instead.

    With FSDP2, applied directly or by accelerate, each process keeps the mask and state of its own shard. A
    `state_dict` then holds tensors of the parameter's shape, sharded like the parameter, which
    `torch.distributed.checkpoint` saves, and loads with any number of processes.

    Half-precision weights have float32 masters. If something else writes a weight, for example when a checkpoint is
    loaded, its master is set to the written value at the next step.

    Args:
        params: a module or its `named_parameters()`, also of a compiled or wrapped module, or groups whose `params` are
            pairs of name and parameter. Parameters without a mask are ignored and never changed.
        masks: parameter name -> bool tensor of its shape: `Masks`, or any mapping.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.

    Attributes:
        state: for each parameter `step`; `exp_avg` and `exp_avg_sq`, (active,), float32, or float64 for float64
            parameters; `index`, the active entries as 16-bit offsets, or as bits if more than 1/16 are active (see
            `sparse_index`); `master`, (active,), float32, for bfloat16 and float16 parameters.

    Raises:
        AdapterError: parameters come without names, there is no mask, a mask names no parameter or has another shape or
            type, a weight is quantised or not contiguous, or a setting is out of range.

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
        """Add a group of named parameters; those without a mask are ignored.

        Args:
            param_group: as in torch, with `params` as pairs of name and parameter.

        Raises:
            AdapterError: its parameters have no names, or none of them has a mask.
        """
        if "param_names" not in param_group:
            (param_group,) = _groups_of([param_group], self._masks) or [{"params": []}]
            if not param_group["params"]:
                raise AdapterError("no parameter of the group has a mask, so nothing of it would be trained")
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the active entries of every parameter that has a gradient.

        Args:
            closure: computes the loss again, as in torch.

        Returns:
            The loss of the closure, or None.

        Raises:
            AdapterError: a gradient is a sparse tensor, or parameters were replaced after the first step.
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
        """The state of any torch optimizer and the active entries; sharded tensors for sharded parameters."""
        self._forget_replaced_parameters()
        for name, parameter in self._named():
            if not self.state[parameter]:
                self.state[parameter].update(_fresh_state(_local(parameter), self._index(name, parameter)))
        content = super().state_dict()
        ids = [i for group in content["param_groups"] for i in group["params"]]
        for i, (_, parameter) in zip(ids, self._named(), strict=True):
            if isinstance(parameter, DTensor):
                content["state"][i] = spread(self.state[parameter], parameter)
        return content

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the saved state of an optimizer with the same masks.

        Raises:
            AdapterError: the state has other masks, parameters, dtypes of weights or shards, or is not of a
                SparseAdamW.
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
        for i, (_, parameter) in zip(ids, named, strict=True):  # torch casts state to the dtype of the parameter
            if i in saved:
                self.state[parameter]["step"] = self.state[parameter]["step"].clone()
                for key in saved[i].keys() & set(_OWN):
                    self.state[parameter][key] = saved[i][key].to(_local(parameter).device, copy=True)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.param_groups:
            yield from zip(group["param_names"], group["params"], strict=True)

    def _forget_replaced_parameters(self) -> None:
        """Drop the state of parameters that sharding, such as accelerate's, replaced before the first step."""
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
        """The active entries of a parameter, or of this process's shard; a collective call if it is sharded."""
        mask = self._masks[name].to(parameter.device)
        if isinstance(parameter, DTensor):
            shards = distribute_tensor(mask.to(torch.uint8), parameter.device_mesh, parameter.placements)
            mask = shards.to_local().bool()
        return index_of(mask)


def _fresh_state(parameter: Tensor, index: Tensor) -> dict[str, Tensor]:
    """Zero moments, and masters equal to the weights for half-precision parameters."""
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
    """Apply torch's AdamW to the active entries, one block after another."""
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
            [state["step"].clone()],  # adamw increments it
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
    """The masters, replaced by the stored weight if that is not the rounded master: something else wrote it."""
    return masters.copy_(torch.where(masters.to(stored.dtype) == stored, masters, stored.to(masters.dtype)))


def _wide(parameter: Tensor) -> torch.dtype:
    """The dtype of moments and masters."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _require_own(saved: Mapping[str, Tensor], name: str, parameter: Tensor) -> None:
    """Raise AdapterError if a saved state is not SparseAdamW's of a parameter of this dtype."""
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
    """Groups of the parameters that have a mask, with their names; every mask must name a parameter."""
    is_model = isinstance(params, torch.nn.Module) or not isinstance(params, Iterable)
    given: list[Any] = list(unwrapped(params).named_parameters() if is_model else cast("Iterable[Any]", params))
    in_groups = bool(given) and isinstance(given[0], dict)
    masked = _groups_of(given if in_groups else [{"params": given}], masks)
    seen = {name for group in masked for name, _ in group["params"]}
    absent = [name for name in masks if name not in seen]
    if not masks:
        raise AdapterError("there is no mask, so nothing would be trained: make masks with make_masks")
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
    return masked


def _groups_of(groups: Iterable[dict[str, Any]], masks: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The groups without parameters that have no mask; groups that would be empty are left out."""
    groups = [{**group, "params": list(group["params"])} for group in groups]
    pairs = [pair for group in groups for pair in group["params"]]
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise AdapterError(
            "SparseAdamW finds masks by name: give the model or its named_parameters(), not model.parameters()"
        )
    parallel = all(name.startswith("module.") for name, _ in pairs)  # names under DistributedDataParallel
    masked = []
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
            masked.append({**group, "params": chosen})
    return masked


def _require_fit(name: str, parameter: Tensor, mask: Tensor) -> None:
    """Raise AdapterError if a mask or its parameter cannot be used."""
    require_trainable_type(name, parameter)
    if mask.dtype != torch.bool or mask.shape != parameter.shape:
        raise AdapterError(
            f"the mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}, the parameter has shape "
            f"{tuple(parameter.shape)}: give a bool tensor of that shape"
        )
    if not _local(parameter).is_contiguous():
        raise AdapterError(f"{name} is not contiguous in memory: make it so before it is trained under a mask")


def require_settings(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Check the settings of AdamW.

    Raises:
        AdapterError: one is not a number or is out of range.
    """
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not (math.isfinite(require_number(name, value)) and value >= 0):
            raise AdapterError(f"{name} is {value}: give a number from 0 up")
    pair = isinstance(betas, Sequence) and not isinstance(betas, str) and len(betas) == 2
    if not (pair and all(0 <= require_number("a beta", beta) < 1 for beta in betas)):
        raise AdapterError(f"betas are {betas}: give two numbers from 0, below 1")


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
