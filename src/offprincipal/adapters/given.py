"""Checks of user input: models, as torch modules or objects that hold one, and numbers."""

from numbers import Real
from typing import Any

from torch import Tensor
from torch.nn import DataParallel, Module
from torch.nn.parallel import DistributedDataParallel

from offprincipal.errors import AdapterError


def module_of(given: Any) -> Module:
    """A torch module, or the module inside an opened language model.

    Args:
        given: a `torch.nn.Module`, or what `offprincipal.models.open_language_model` returns.

    Raises:
        AdapterError: it is neither.

    >>> from torch.nn import Linear
    >>> module_of(Linear(2, 2))
    Linear(in_features=2, out_features=2, bias=True)
    """
    module = given if isinstance(given, Module) else getattr(given, "model", None)
    if not isinstance(module, Module):
        raise AdapterError(
            f"the model is a {type(given).__name__}: give a torch.nn.Module, or what offprincipal.models."
            "open_language_model opens"
        )
    return module


def unwrapped(given: Any) -> Module:
    """The module inside the wrappers of `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    Its parameters have the names that they had before wrapping.

    Args:
        given: as in `module_of`.

    Raises:
        AdapterError: it is not a module and holds none.

    >>> from torch.nn import Linear
    >>> [name for name, _ in unwrapped(DataParallel(Linear(2, 2))).named_parameters()]
    ['weight', 'bias']
    """
    module = module_of(given)
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, DataParallel | DistributedDataParallel):
            inner = module.module
        if not isinstance(inner, Module):
            return module
        module = inner


def require_no_adapter(model: Module) -> None:
    """Check that a model has no PEFT adapter.

    Raises:
        AdapterError: it has one.
    """
    if hasattr(model, "peft_config"):
        raise AdapterError("the model has an adapter already: merge it (merge_and_unload), or open the base again")


def require_number(name: str, value: Any) -> float:
    """A setting as a float; a tensor with one entry is accepted, since learning rates in torch may be tensors.

    Raises:
        AdapterError: the value is neither a number nor such a tensor.

    >>> require_number("density", "0.2")
    Traceback (most recent call last):
    ...
    offprincipal.errors.AdapterError: density is '0.2': give a number
    """
    if not (isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)):
        raise AdapterError(f"{name} is {value!r}: give a number")
    return float(value)
