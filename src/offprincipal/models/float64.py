"""Float64 in earnest: models of transformers take norms and softmaxes in float32 whatever type they are given."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class InFloat64(TorchFunctionMode):
    """Inside, whatever asks torch for float32 is given float64.

    >>> with InFloat64():
    ...     torch.ones(1).double().to(torch.float32).dtype
    torch.float64
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        widened = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **widened)


def computing_in(dtype: str) -> AbstractContextManager[Any]:
    """Where a model of that type computes: `float64` in earnest, `float32` as it is."""
    return InFloat64() if dtype == "float64" else nullcontext()


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
