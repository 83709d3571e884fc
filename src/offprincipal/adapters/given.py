"""What users give for a model: a module of torch, or one of ours that holds it."""

from typing import Any

from torch.nn import Module

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
