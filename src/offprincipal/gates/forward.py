"""Sums over sequences from forward passes: divergences along an update, and Fisher forms of many directions.

Everything is streamed: only the logits of one batch of sequences and a few directions are held at once. Knows nothing
of where sequences or directions come from.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offprincipal.errors import ModelError
from offprincipal.gates.sequences import Sequences
from offprincipal.gates.updates import moved_by
from offprincipal.models import LanguageModel
from offprincipal.models.divergence import kl_per_token
from offprincipal.models.fisher import Batch, batches_within, counted_logits, fisher_per_token

Array = NDArray[np.float64]
Direction = Mapping[str, Tensor]
_TOKENS = 2048  # padded tokens in a batch, at most
_FLOATS = 1 << 26  # of activations and logits, with their derivatives, at once
_PARAMETERS = 1 << 27  # entries of the directions that are held at once


def kl_sums(
    language_model: LanguageModel, update: Direction, fractions: Sequence[float], sequences: Sequences
) -> Array:
    """Σ_t KL(π_s‖π_0) over each sequence, at fractions s of the line from the base to the tuned weights.

    Returns:
        (fractions, sequences), in nats.

    Raises:
        ModelError: a divergence is not finite.
    """
    model = language_model.model
    found = np.zeros((len(fractions), len(sequences)))
    for chosen, batch in _batches(language_model, sequences):
        base = counted_logits(model, batch)
        for place, fraction in enumerate(fractions):
            with moved_by(model, update, fraction):
                moved = counted_logits(model, batch)
            found[place, chosen] = _by_row(kl_per_token(moved, base)[None], batch)[0]
    if not np.isfinite(found).all():
        raise ModelError(
            "a divergence from the base is not finite: the tuned model's logits are NaN, or −∞ in the base"
        )
    return found


def fisher_sums(
    language_model: LanguageModel,
    directions: Sequence[Callable[[], Direction]],
    sequences: Sequences,
    done: Callable[[int], None] = lambda count: None,
) -> tuple[Array, Array]:
    """Σ_t Var_{y∼π}[(J_D z)_y] over each sequence, for each direction D, at the model's own weights.

    Args:
        directions: each returns parameter name -> tensor; a few are held at once.
        done: called with the number of directions measured.

    Returns:
        (directions, sequences), and ‖D‖_F² of each direction (directions,).

    Raises:
        ModelError: a part of the model has no forward-mode derivative.
    """
    model = language_model.model
    found, squares = np.zeros((len(directions), len(sequences))), np.zeros(len(directions))
    start = 0
    for stack, norms in _stacks(language_model, directions, max(map(len, sequences.ids))):
        rows = slice(start, start + len(norms))
        squares[rows] = norms
        if stack:
            for chosen, batch in _batches(language_model, sequences):
                found[rows, chosen] = _by_row(fisher_per_token(model, stack, batch), batch)
        start = rows.stop
        done(len(norms))
    return found, squares


def _stacks(
    language_model: LanguageModel, directions: Sequence[Callable[[], Direction]], longest: int
) -> Iterator[tuple[dict[str, Tensor], Array]]:
    """Directions a few at a time, stacked by parameter, with their squared norms; unmoved parameters are left out."""
    batch = _TOKENS * _floats_a_token(language_model, longest)
    most = max(1, _FLOATS // batch)
    start = 0
    while start < len(directions):
        first = directions[start]()
        size = sum(tensor.numel() for tensor in first.values())
        count = max(1, min(most, len(directions) - start, _PARAMETERS // max(size, 1)))
        built = [first, *(make() for make in directions[start + 1 : start + count])]
        squares = np.array([sum(float(x.double().square().sum()) for x in each.values()) for each in built])
        like = {name: tensor for each in built for name, tensor in each.items()}
        yield (
            {name: torch.stack([each.get(name, torch.zeros_like(x)) for each in built]) for name, x in like.items()},
            squares,
        )
        start += count


def _batches(language_model: LanguageModel, sequences: Sequences) -> Iterator[tuple[list[int], Batch]]:
    longest = max(map(len, sequences.ids))
    tokens = min(_TOKENS, max(1, _FLOATS // _floats_a_token(language_model, longest)))
    return batches_within(sequences.ids, sequences.first, tokens, language_model.device)


def _floats_a_token(language_model: LanguageModel, longest: int) -> int:
    """What a forward pass holds of a token at once, roughly: its logits, and one layer's activations and attention."""
    config = language_model.model.config.get_text_config()
    heads, hidden = (getattr(config, name, 0) for name in ("num_attention_heads", "hidden_size"))
    return int(config.vocab_size + 32 * hidden + 2 * heads * longest)


def _by_row(of_tokens: Tensor, batch: Batch) -> Array:
    """Sums over the tokens of each row; (…, rows)."""
    sums = of_tokens.new_zeros(len(of_tokens), len(batch.ids))
    sums.index_add_(1, batch.row_of_token, of_tokens)
    table: Array = sums.cpu().numpy()
    return table
