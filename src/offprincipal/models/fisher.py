"""The Fisher form of a causal language model, exact over the vocabulary.

It is taken in forward mode: the derivative of every logit along a direction in weight space, and its
variance under the model's own distribution. No label is sampled, so nothing but the choice of contexts varies.
Knows models as functions of their parameters; knows nothing of checkpoints, prompts or layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jvp, vmap

from offprincipal.errors import ArgumentError, ModelError


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right, which a causal model reads without a mask, and the positions that count.

    Args:
        ids: (rows, length), int64.
        counted: (rows, length), bool: whether the distribution of the token after this position is measured.
    """

    ids: Tensor
    counted: Tensor

    @staticmethod
    def of(ids: Sequence[Sequence[int]], first: Sequence[int], device: torch.device | str = "cpu") -> "Batch":
        """A batch from rows of tokens, each counted from a position to its end.

        >>> Batch.of([[5, 6, 7], [5, 6]], first=[1, 0]).counted.tolist()
        [[False, True, True], [True, True, False]]
        """
        longest = max(map(len, ids))
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=device)
        place = torch.arange(longest, device=device)
        start, stop = (torch.tensor(list(ends), device=device)[:, None] for ends in (first, map(len, ids)))
        return Batch(padded, (place >= start) & (place < stop))

    @property
    def row_of_token(self) -> Tensor:
        """Which row each counted token is of; (tokens,)."""
        return self.counted.nonzero()[:, 0]


@torch.no_grad()
def counted_logits(model: Any, batch: Batch) -> Tensor:
    """Logits where the batch counts; (tokens, vocabulary)."""
    logits: Tensor = model(input_ids=batch.ids, use_cache=False).logits[batch.counted]
    return logits


def logit_derivatives(model: Any, directions: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and their derivatives along directions in weight space, by forward-mode differentiation.

    Args:
        model: a causal language model in evaluation mode; its attention must have a forward-mode derivative, as that
            of `attn_implementation="eager"` has.
        directions: parameter name -> (directions, *shape of the parameter). Other parameters stay fixed; a tied
            parameter is named once.
        batch: on the model's device.

    Returns:
        (tokens, vocabulary) and (directions, tokens, vocabulary).

    Raises:
        ModelError: a part of the model has no forward-mode derivative.
        ArgumentError: a direction's name is not a parameter of the model.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name in directions:
        if name not in parameters:
            raise ArgumentError(f"{name} is not a parameter of {type(model).__name__}: a tied parameter has one name")
    moved = {name: parameters[name] for name in directions}

    def logits(moving: Mapping[str, Tensor]) -> Tensor:
        output = functional_call(model, parameters | dict(moving), (), {"input_ids": batch.ids, "use_cache": False})
        found: Tensor = output.logits
        return found

    def along(direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        primal, tangent = jvp(logits, (moved,), (direction,))  # type: ignore[misc]  # three only with has_aux
        return primal, tangent

    out_dims: Any = (None, 0)  # the logits are the same for all directions, and computed once
    try:
        with torch.no_grad():
            primal, tangent = vmap(along, out_dims=out_dims)(dict(directions))
    except NotImplementedError as error:
        raise ModelError(_without_derivative(model, error)) from error
    return primal[batch.counted], tangent[:, batch.counted]


def logit_variances(logits: Tensor, derivatives: Tensor) -> Tensor:
    """Var_{y∼π}[(J_D z)_y]: what one token adds to DᵀFD.

    Args:
        logits: (tokens, vocabulary); derivatives: (directions, tokens, vocabulary).

    Returns:
        float64, (directions, tokens), in nats per squared unit of the direction.

    Source: the Fisher information of a softmax is diag(p) − ppᵀ in the logits (Amari 1998; Martens 2014, section 8).

    >>> logit_variances(torch.zeros(1, 2), torch.tensor([[[1.0, -1.0]]]))
    tensor([[1.]], dtype=torch.float64)
    """
    p = logits.double().softmax(-1).to(derivatives.dtype)
    mean = torch.einsum("tv,dtv->dt", p, derivatives)
    centred = derivatives - mean[..., None]
    return torch.einsum("tv,dtv->dt", p, centred.square()).double()


def fisher_per_token(model: Any, directions: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """DᵀF_tD for every counted token t and direction D, exact over labels.

    Args:
        model, directions, batch: as for `logit_derivatives`.

    Returns:
        float64, (directions, tokens), in nats per squared unit of the direction.

    Raises:
        ModelError: a part of the model has no forward-mode derivative.
        ArgumentError: a direction's name is not a parameter of the model.

    Source: as `logit_variances`.

    >>> from types import SimpleNamespace
    >>> class Table(torch.nn.Module):  # a bigram model: two tokens, logits straight from a table
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.zeros(2, 2))
    ...     def forward(self, input_ids, use_cache):
    ...         return SimpleNamespace(logits=self.weight[input_ids])
    >>> along = {"weight": torch.tensor([[[1.0, -1.0], [0.0, 0.0]]])}
    >>> fisher_per_token(Table(), along, Batch.of([[0, 1, 1]], first=[0]))  # only the first token's logits move
    tensor([[1., 0., 0.]], dtype=torch.float64)
    """
    return logit_variances(*logit_derivatives(model, directions, batch))


def fisher_quadratic(model: Any, directions: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """DᵀFD = E_t Var_{y∼π}[(J_D z)_y] of each direction, the mean over the batch's counted tokens.

    Args:
        model, directions, batch: as for `logit_derivatives`.

    Returns:
        float64, (directions,), in nats per token.

    Raises:
        ModelError: a part of the model has no forward-mode derivative.

    >>> from types import SimpleNamespace
    >>> class Table(torch.nn.Module):  # a bigram model: two tokens, logits straight from a table
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.zeros(2, 2))
    ...     def forward(self, input_ids, use_cache):
    ...         return SimpleNamespace(logits=self.weight[input_ids])
    >>> along = {"weight": torch.tensor([[[1.0, -1.0], [0.0, 0.0]]])}
    >>> fisher_quadratic(Table(), along, Batch.of([[0, 0, 1, 1]], first=[0]))  # half of the tokens see the direction
    tensor([0.5000], dtype=torch.float64)
    """
    return fisher_per_token(model, directions, batch).mean(-1)


def batches_within(
    ids: Sequence[Sequence[int]], first: Sequence[int], tokens: int, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """Sequences in batches of similar length, with at most `tokens` padded tokens unless a single one is longer.

    Returns:
        The indices of the sequences, and their batch.
    """
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    while order:
        rows = max(1, tokens // len(ids[order[0]]))
        chosen, order = order[:rows], order[rows:]
        yield chosen, Batch.of([ids[i] for i in chosen], [first[i] for i in chosen], device)


def _without_derivative(model: Any, error: NotImplementedError) -> str:
    reason = str(error).splitlines()[0]
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention not in (None, "eager"):
        return (
            f"attn_implementation='{attention}' of {type(model).__name__} has no forward-mode derivative ({reason}): "
            "choose attn_implementation='eager' (--attention eager)"
        )
    return (
        f"a part of {type(model).__name__} has no forward-mode derivative, so its curvature is not measured: {reason}"
    )
