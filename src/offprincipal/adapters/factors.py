"""Factors: the two matrices of a low-rank update ΔW = s·B A, where what is trained is not yet what acts.

PEFT takes a factor for a linear layer without bias: it reads `weight`, calls it, saves and loads it. Here `weight` is
what acts, the one parameter `trained` is what an optimizer moves, and a state dict holds what acts, under the name of
`weight`: so a saved adapter is plain LoRA. Knows nothing of PEFT, of models, or of where the factors start.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class FrozenFactor(nn.Module):
    """A factor that is not trained: its matrix is a buffer, which no optimizer sees and every state dict holds."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def anew(self, start: Tensor) -> "FrozenFactor":
        """Another one like it, for a further adapter: it is its matrix, whatever PEFT starts with."""
        return FrozenFactor(self.weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class Factor(nn.Module):
    """A factor whose parameter becomes what acts through `acting`.

    Reading `weight` computes what acts anew, because no trace in a tensor tells that it moved: fused optimizers and
    writes through `.data` leave none. Between `hold` and `release`, which a layer puts around its forward pass, every
    reading gives the same tensor. State dicts have `weight` alone.
    """

    def __init__(self, trained: Tensor) -> None:
        super().__init__()
        self.trained = nn.Parameter(trained)
        self._held: list[Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """(out, in), what acts."""
        if self._held is None:
            return self.acting(self.trained)
        if not self._held:
            self._held.append(self.acting(self.trained))
        return self._held[0]

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)

    def hold(self) -> None:
        """Until `release`, what acts is computed once: nothing may move it in between."""
        self._held = []

    def release(self) -> None:
        self._held = None

    def acting(self, trained: Tensor) -> Tensor:
        """What acts, of what is trained."""
        raise NotImplementedError

    def anew(self, start: Tensor) -> "Factor":
        """A factor of this kind at its start, for a further adapter; `start` is PEFT's."""
        raise NotImplementedError

    def stored(self) -> Tensor:
        """What acts, as a state dict holds it."""
        return self.weight.detach()

    def trained_of(self, acting: Tensor) -> Tensor:
        """What to train on from, of what a state dict holds.

        Raises:
            ValueError: this factor cannot act so.
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
    """A factor beside its own start, so that B A − B0 A0 is one product: `[B, −B0] [A; A0]`.

    Args:
        trained: the factor at its start, A0 (r, m) or B0 (n, r).
        beside: what is put beside it and never trained, A0 or −B0.
        dim: along which: 0 for A, 1 for B.

    Source: the identity by which PEFT turns PiSSA and OLoRA adapters into plain ones; here it holds from the start on,
    so the base stays as it is.

    >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    >>> A, B = OffsetFactor(a, a, 0), OffsetFactor(b, -b, 1)
    >>> B.weight @ A.weight
    tensor([[0., 0.]], grad_fn=<MmBackward0>)
    >>> A.state_dict()["weight"].shape
    torch.Size([2, 2])
    """

    beside: Tensor

    def __init__(self, trained: Tensor, beside: Tensor, dim: int) -> None:
        super().__init__(trained.clone())
        self.dim = dim
        self.register_buffer("beside", beside.clone(), persistent=False)

    def acting(self, trained: Tensor) -> Tensor:
        return torch.cat([trained, self.beside], self.dim)

    def anew(self, start: Tensor) -> "OffsetFactor":
        return OffsetFactor(self.beside if self.dim == 0 else -self.beside, self.beside, self.dim)

    def trained_of(self, acting: Tensor) -> Tensor:
        if acting.shape != self.weight.shape:
            raise ValueError(f"is of shape {tuple(acting.shape)}, not {tuple(self.weight.shape)}")
        rank = self.trained.shape[self.dim]
        beside = acting.narrow(self.dim, rank, rank).to(self.beside)
        if not torch.allclose(beside, self.beside, rtol=1e-4, atol=1e-5 * float(self.beside.abs().max())):
            raise ValueError("started from other values: it is of another base, method or seed")
        return acting.narrow(self.dim, 0, rank)
