"""Whether two sets of weights give the same function: compare float64 logits, and measure KL divergences.

transformers computes norms and some softmaxes in float32 regardless of the weights; here they are computed in float64
too. Knows nothing of what was done to the weights.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from offprincipal.errors import InterventionError
from offprincipal.geometry.draws import generator_of
from offprincipal.interventions.architectures import HEAD
from offprincipal.models.divergence import kl_per_token
from offprincipal.models.float64 import InFloat64

TOLERANCE = 1e-9
SEQUENCES = 8
LENGTH = 32


@torch.no_grad()
def logits(model: Any, weights: dict[str, Tensor], ids: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The logits of a model with other weights.

    Args:
        model: a transformers model; its own weights are not used.
        weights: name -> tensor; without the head if it is tied to the embedding.
        ids: int64, (sequences, length).
        dtype: of the computation.

    Returns:
        float64, (sequences, length, vocabulary).
    """
    arguments = {"input_ids": ids, "use_cache": False}
    cast = {name: x.to(dtype) for name, x in weights.items()}
    with InFloat64() if dtype is torch.float64 else nullcontext():
        output = torch.func.functional_call(model, cast, (), arguments, tie_weights=HEAD not in cast)
    computed: Tensor = output.logits
    return computed.double()


def require_equal(ours: Tensor, theirs: Tensor, what: str) -> float:
    """The largest difference between two sets of logits, divided by the largest logit; checked to be rounding.

    Args:
        ours, theirs: float64, of one shape.
        what: was done to the weights, as the subject of the message.

    Raises:
        InterventionError: the relative difference is above 1e-9 or not finite.

    >>> require_equal(torch.tensor([2.0, 1.0]), torch.tensor([2.0, 1.0]), "nothing")
    0.0
    """
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference <= TOLERANCE:
        raise InterventionError(
            f"{what} changes the model's function: float64 logits differ by {difference:.1e} relatively, and at most "
            f"{TOLERANCE:.0e} is rounding. Nothing was written; please report the model's config.json"
        )
    return difference


def divergence(reference: Tensor, other: Tensor) -> float:
    """KL(reference‖other) in nats per token, mean over all positions.

    Args:
        reference, other: logits, float64, (…, vocabulary).

    >>> divergence(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))  # log((1 + e)/2) − 1/2
    0.120...
    """
    return float(kl_per_token(reference, other).mean())


def random_tokens(vocabulary: int, length: int, seed: int) -> Tensor:
    """Sequences of uniformly random tokens; int64, (8, length)."""
    return torch.randint(vocabulary, (SEQUENCES, length), generator=generator_of(seed, "tokens"))


@torch.no_grad()
def sampled_tokens(model: Any, length: int, seed: int) -> Tensor:
    """Sequences sampled from a model at temperature 1 after one uniformly random token; int64, (8, length)."""
    generator = generator_of(seed, "samples")
    ids = random_tokens(model.get_input_embeddings().weight.shape[0], 1, seed)
    for _ in range(length - 1):
        probabilities = model(input_ids=ids, use_cache=False).logits[:, -1].double().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return ids


def non_finite(weights: dict[str, Tensor]) -> Iterator[str]:
    """The names of tensors that hold NaN or infinity."""
    return (name for name, x in weights.items() if not bool(torch.isfinite(x).all()))
