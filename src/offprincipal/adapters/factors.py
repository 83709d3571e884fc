"""Factors A and B of a low-rank update ΔW = s·B A whose effective value is computed from a trained parameter.

PEFT expects each factor to be a linear layer without bias: it reads `weight`, calls the layer, saves and loads it. Here
`weight` is the effective factor, computed from the only parameter, `trained`, which the optimizer updates. A state dict
holds the effective factor under the name `weight`, so a saved adapter is plain LoRA. Knows nothing of PEFT, of models,
or of how the factors are initialised.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class FrozenFactor(nn.Module):
    """A factor that is not trained: its matrix is a buffer, which state dicts hold and optimizers do not see.

    Args:
        weight: A (r, m) or B (n, r).

    >>> list(FrozenFactor(torch.eye(2)).parameters())
    []
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def another(self, start: Tensor) -> "FrozenFactor":
        """A frozen copy of this factor, for another adapter of the layer; PEFT's initial value `start` is ignored."""
        return FrozenFactor(self.weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class Factor(nn.Module):
    """A factor whose effective value is `effective(trained)`; subclasses define `effective`.

    Each read of `weight` computes the effective factor again, because a tensor does not show reliably that it changed:
    fused optimizers and writes through `.data` do not raise its version counter. Between `hold` and `release`, which
    `AdaptedLinear` calls before and after its forward pass, all reads give the same tensor. State dicts hold only
    `weight`.

    Args:
        trained: initial value of the trained parameter.
    """

    def __init__(self, trained: Tensor) -> None:
        super().__init__()
        self.trained = nn.Parameter(trained)
        self._held: list[Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """The effective factor, (out, in)."""
        if self._held is None:
            return self.effective(self.trained)
        if not self._held:
            self._held.append(self.effective(self.trained))
        return self._held[0]

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)

    def hold(self) -> None:
        """Compute the effective factor only once until `release`; `trained` must not change in between."""
        self._held = []

    def release(self) -> None:
        """Compute the effective factor at every read again."""
        self._held = None

    def effective(self, trained: Tensor) -> Tensor:
        """The effective factor, from the trained parameter."""
        raise NotImplementedError

    def another(self, start: Tensor) -> "Factor":
        """An untrained factor of this kind, for another adapter of the layer; `start` is PEFT's initial value."""
        raise NotImplementedError

    def stored(self) -> Tensor:
        """The effective factor, as a state dict holds it."""
        return self.weight.detach()

    def trained_of(self, effective: Tensor) -> Tensor:
        """The trained parameter from which training continues, from the effective factor in a state dict.

        Raises:
            ValueError: no trained parameter of this factor gives that effective value.
        """
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.stored()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        key, errors = prefix + "weight", rest[-1]
        if key in state_dict:
            try:
                state_dict = {prefix + "trained": self.trained_of(state_dict[key])}
            except ValueError as error:
                errors.append(f"{key} {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)


class OffsetFactor(Factor):
    """A factor concatenated with its own initial value, so that B A − B0 A0 is one product: `[B, −B0] [A; A0]`.

    Args:
        trained: the initial value, A0 (r, m) or B0 (n, r).
        constant: the constant part, A0 or −B0, of the same shape.
        dim: the dimension of concatenation, 0 for A and 1 for B.

    Source: the identity by which PEFT converts PiSSA and OLoRA adapters to plain LoRA. PEFT applies it when saving;
    here it is used throughout training, so the base is never changed.

    >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    >>> A, B = OffsetFactor(a, a, 0), OffsetFactor(b, -b, 1)
    >>> B.weight @ A.weight
    tensor([[0., 0.]], grad_fn=<MmBackward0>)
    >>> A.state_dict()["weight"].shape
    torch.Size([2, 2])
    """

    constant: Tensor

    def __init__(self, trained: Tensor, constant: Tensor, dim: int) -> None:
        super().__init__(trained.clone())
        self.dim = dim
        self.register_buffer("constant", constant.clone(), persistent=False)

    def effective(self, trained: Tensor) -> Tensor:
        return torch.cat([trained, self.constant], self.dim)

    def another(self, start: Tensor) -> "OffsetFactor":
        return OffsetFactor(self.constant if self.dim == 0 else -self.constant, self.constant, self.dim)

    def trained_of(self, effective: Tensor) -> Tensor:
        if effective.shape != self.weight.shape:
            raise ValueError(f"is of shape {tuple(effective.shape)}, not {tuple(self.weight.shape)}")
        rank = self.trained.shape[self.dim]
        constant = effective.narrow(self.dim, rank, rank).to(self.constant)
        if not torch.allclose(constant, self.constant, rtol=1e-4, atol=1e-5 * float(self.constant.abs().max())):
            raise ValueError("started from other values: it is of another base, method or seed")
        return effective.narrow(self.dim, 0, rank)
