"""What users give: a module of torch, one of ours that holds it or a wrapper around it; and numbers."""

from numbers import Real
from typing import Any

from torch import Tensor
from torch.nn import DataParallel, Module
from torch.nn.parallel import DistributedDataParallel

from offprincipal.errors import AdapterError


def module_of(given: Any) -> Module:
    """The module itself, or that of an opened language model.

    Raises:
        AdapterError: it is neither.

    >>> from torch.nn import Linear
    >>> module_of(Linear(2, 2))
    Linear(in_features=2, out_features=2, bias=True)
    """
    found = given if isinstance(given, Module) else getattr(given, "model", None)
    if not isinstance(found, Module):
        raise AdapterError(
            f"the model is a {type(given).__name__}: give a torch.nn.Module, or what offprincipal.models."
            "open_language_model opens"
        )
    return found


def unwrapped(given: Any) -> Module:
    """The module as it was before `torch.compile` or data parallelism wrapped it: names are the model's own again.

    Raises:
        AdapterError: it holds no module.

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
    """Raises AdapterError where PEFT has put an adapter around a model already."""
    if hasattr(model, "peft_config"):
        raise AdapterError("the model has an adapter already: merge it (merge_and_unload) or open the base anew")


def require_number(name: str, value: Any) -> float:
    """A setting as a number; a tensor of one entry is one too, as torch's learning rates may be.

    Raises:
        AdapterError: it is not a number.

    >>> require_number("density", "0.2")
    Traceback (most recent call last):
    ...
    offprincipal.errors.AdapterError: density is '0.2': give a number
    """
    if not (isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)):
        raise AdapterError(f"{name} is {value!r}: give a number")
    return float(value)
