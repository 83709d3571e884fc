"""The one Kullback–Leibler divergence of next-token distributions. Knows tensors, and no models."""

import torch
from torch import Tensor

from offprincipal.errors import ArgumentError

_CHUNK = 1 << 22  # terms in float64 at once, 32 MiB a table


@torch.no_grad()
def kl_per_token(new: Tensor, old: Tensor) -> Tensor:
    """KL(new‖old) of next-token distributions, exact over the vocabulary.

    Summed as Σ p·(e^−δ − 1 + δ), δ = log p − log q: no term is negative, and rounding enters in second order, so that
    the divergence of one small step survives float32 logits, where Σ p·δ is a difference of large terms.

    Args:
        new, old: logits or log-probabilities, (…, vocabulary), any float type; the sums are taken in float64,
            some tokens at a time.

    Returns:
        float64, (…), in nats; infinite where `old` rules out what `new` may say, NaN if a side is.

    Raises:
        ArgumentError: the shapes differ.

    Source: the Bregman form of the divergence; the added terms q − p sum to zero.

    >>> new, old = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> round(kl_per_token(new, old).item(), 4)  # log cosh(1/2)
    0.1201
    """
    if new.shape != old.shape:
        raise ArgumentError(f"logits of shapes {tuple(new.shape)} and {tuple(old.shape)} are not of one vocabulary")
    found = new.new_empty(new.shape[:-1].numel(), dtype=torch.float64)
    step = max(1, _CHUNK // new.shape[-1])
    for start in range(0, len(found), step):
        tokens = slice(start, start + step)
        log_p, log_q = (x.flatten(end_dim=-2)[tokens].double().log_softmax(-1) for x in (new[None], old[None]))
        p, q, delta = log_p.exp(), log_q.exp(), log_p - log_q
        near, far = p * (torch.expm1(-delta) + delta), q - p + p * delta  # e^−δ may overflow where δ is far below zero
        found[tokens] = torch.where(p == 0, q, torch.where(delta < -1, far, near)).sum(-1)
    return found.view(new.shape[:-1])
