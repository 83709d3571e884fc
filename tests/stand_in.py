"""A device that is none: tensors that say they lie on a GPU, are computed on the CPU, and refuse to meet those that do.

So a forgotten `.to(device)` fails on a machine without a GPU as it would on one: operations between a tensor of the
stand-in and one of the CPU raise, as do `numpy()` and in-place copies of storage. Numbers are the CPU's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from offprincipal.comparison.work import Work
from offprincipal.measures import spectral
from offprincipal.trajectories.work import Followed

GPU = torch.device("meta")  # which every build of torch knows; those of GPUs want a driver


class Elsewhere(Tensor):
    """A tensor that says it lies on a GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=GPU
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, args, kwargs or {})


def held_by(leaf: Any) -> Any:
    """What is computed with; `torch.tensor([], device=…)`, which caches begin with, is made past every mode."""
    if isinstance(leaf, Tensor) and leaf.device.type == GPU.type and not isinstance(leaf, Elsewhere):
        assert leaf.numel() == 0, "a tensor of the stand-in that holds nothing"
        return torch.empty(leaf.shape, dtype=leaf.dtype)
    return leaf.held if isinstance(leaf, Elsewhere) else leaf


MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


def run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the CPU; its results lie where its tensors do, or where it is told to put them."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    there = [isinstance(leaf, Elsewhere) for leaf in tensors]
    device = kwargs.get("device")
    wanted = None if device is None else torch.device(device).type == GPU.type
    if operation not in MOVES and any(there):
        for leaf, elsewhere in zip(tensors, there, strict=True):
            if not elsewhere and leaf.dim() > 0 and leaf.device.type != GPU.type:
                raise RuntimeError(f"{operation}: tensors elsewhere and on the cpu meet, of shape {tuple(leaf.shape)}")
    plain_args, plain = tree_map(held_by, (args, kwargs))
    if device is not None:
        plain["device"] = torch.device("cpu")
    plain.pop("pin_memory", None)
    found = operation(*plain_args, **plain)
    if operation is torch.ops.aten.copy_.default:
        return args[0]
    if wanted is None:
        wanted = any(there)
    if not wanted:
        return found
    given = {id(leaf.held): leaf for leaf in tensors if isinstance(leaf, Elsewhere)}  # of operations in place

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return given[id(leaf)] if id(leaf) in given else Elsewhere(leaf)

    return tree_map(wrapped, found)


class Intercepting(TorchDispatchMode):
    """Inside, whatever is made on or moved to a GPU is of the stand-in; a mode is of one thread."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_flatten((args, kwargs))[0]
        device = kwargs.get("device")
        if device is not None or any(isinstance(leaf, Elsewhere) for leaf in leaves):
            return run(operation, args, kwargs)
        return operation(*args, **kwargs)


@contextmanager
def stand_in(monkeypatch: Any) -> Iterator[None]:
    """Whoever asks for `cuda` gets the stand-in, in this thread and in those that measure."""

    def there(measure: Callable[..., Any]) -> Callable[..., Any]:
        def measured(self: Work, *asked: Any, **named: Any) -> Any:
            with Intercepting():
                return measure(self, *asked, **named)

        return measured

    monkeypatch.setattr(Work, "measure", there(Work.measure))
    monkeypatch.setattr(Followed, "follow", there(Followed.follow))
    monkeypatch.setattr(spectral, "chosen_device", lambda wanted: GPU if wanted == "cuda" else torch.device("cpu"))
    with Intercepting():
        yield
