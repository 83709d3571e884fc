"""How far a policy moved on fixed sequences: exact divergences over the vocabulary, from one forward pass.

Knows language models and token ids; knows nothing of weights, steps or files.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offprincipal.errors import ArgumentError, ModelError
from offprincipal.models.divergence import kl_per_token
from offprincipal.training.processes import in_process_group

MOST_SEQUENCES, MOST_TOKENS = 16, 64
_MOST_NUMBERS = 1 << 26  # float32 log-probabilities that are kept of one policy: 256 MiB


@dataclass(frozen=True)
class PaddedSequences:
    """Token sequences of several lengths, padded on the right.

    Args:
        ids: (s, length), int64.
        lengths: (s,), int64, at least 2 each.
        counted: (s, length), bool: tokens whose prediction counts; never padding, nor the first of a sequence.
    """

    ids: Tensor
    lengths: Tensor
    counted: Tensor

    @property
    def mask(self) -> Tensor:
        """(s, length), int64: 1 on tokens, 0 on padding."""
        return (torch.arange(self.ids.shape[1])[None] < self.lengths[:, None]).long()


def sequences_of(
    rows: Sequence[Sequence[int]], vocabulary: int | None = None, counted: Sequence[Sequence[bool]] | None = None
) -> PaddedSequences:
    """The sequences that divergence is measured on.

    At most 16 rows, spread evenly over those given, and the last 64 tokens of each; fewer where 256 MiB of float32
    log-probabilities would not hold them.

    Args:
        rows: token ids; a row in which no token counts is left out.
        vocabulary: entries of the model's vocabulary; None: not known, no bound on memory.
        counted: as `rows`, which tokens count, those of completions say; None: all but the first of each row, which
            nothing predicts.

    Raises:
        ArgumentError: no token of any row counts, or one is not in the vocabulary.

    >>> sequences_of([[5, 6, 7], [8, 9], [1]]).counted
    tensor([[False,  True,  True],
            [False,  True, False]])
    """
    marks = [[True] * len(row) for row in rows] if counted is None else counted
    tails = [(list(row)[-MOST_TOKENS:], list(mark)[-MOST_TOKENS:]) for row, mark in zip(rows, marks, strict=True)]
    usable = [(ids, mark) for ids, mark in tails if any(mark[1:])]
    if not usable:
        raise ArgumentError("no sequence to measure divergence on: give lists of at least two token ids")
    if vocabulary is not None:
        strange = next((i for ids, _ in usable for i in ids if not 0 <= i < vocabulary), None)
        if strange is not None:
            raise ArgumentError(
                f"token {strange} is not in the model's vocabulary of {vocabulary}: give token ids of its own tokenizer"
            )
    longest = max(len(ids) for ids, _ in usable)
    count = min(len(usable), MOST_SEQUENCES)
    if vocabulary is not None:
        count = max(1, min(count, _MOST_NUMBERS // (vocabulary * longest)))
    chosen = [usable[i * len(usable) // count] for i in range(count)]
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in chosen])
    counts = torch.tensor([[False, *mark[1:]] + [False] * (longest - len(mark)) for _, mark in chosen])
    return PaddedSequences(ids, torch.tensor([len(row) for row, _ in chosen]), counts)


def unpadded(ids: Tensor, values: Tensor, mask: Tensor | None) -> tuple[list[list[int]], list[list[bool]]]:
    """The rows of a padded batch, and of values of its shape, without the padding.

    >>> unpadded(torch.tensor([[0, 5, 6]]), torch.tensor([[False, False, True]]), torch.tensor([[0, 1, 1]]))
    ([[5, 6]], [[False, True]])
    """
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    rows = [line[keep].tolist() for line, keep in zip(ids, kept, strict=True)]
    return rows, [line[keep].tolist() for line, keep in zip(values, kept, strict=True)]


def vocabulary_of(model: Any) -> int | None:
    """Entries of a transformers model's vocabulary; None of another kind of module."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


def log_probabilities(model: Any, sequences: PaddedSequences) -> Tensor:
    """What a policy says of every token that counts, given those before it; its mode and all random states stay.

    It is read in the precision of the weights, also in a training that computes in bfloat16 by autocast: rounding the
    activations to bfloat16 would by itself make a divergence of some 1e-5, far above that of one step. Every process
    of a sharded model calls it together.

    Args:
        model: called with `input_ids` and `attention_mask`; gives logits, (s, length, vocabulary), or something that
            has them as `.logits`.

    Returns:
        float32, (positions, vocabulary), on the model's device.

    Raises:
        ModelError: the model gives no logits for that, or those of a decoder that reads something else.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder and a decoder, so that no sequence alone tells what it says next"
        )
    device = next(iter(model.parameters())).device
    inputs: dict[str, Any] = {"input_ids": sequences.ids.to(device), "attention_mask": sequences.mask.to(device)}
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False
    with undisturbed(model), in_precision_of_weights(model):
        try:
            output = model(**inputs)
        except Exception as error:  # whatever a model raises where it wants other inputs
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{type(model).__name__} takes no input_ids and attention_mask alone: {reason}") from error
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise ModelError(
                f"{type(model).__name__} gives no logits for input_ids and attention_mask: monitor it without sequences"
            )
        found: Tensor = logits[:, :-1][sequences.counted[:, 1:].to(device)].float().log_softmax(-1)
    return found


def mean_divergence(log_p: Tensor, log_q: Tensor) -> float | None:
    """KL(p‖q) in nats, the mean over positions; None where it is not finite.

    Args:
        log_p, log_q: (positions, vocabulary).

    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> round(mean_divergence(p.log(), q.log()), 6)
    0.143841
    """
    mean = float(kl_per_token(log_p, log_q).mean())
    return mean if math.isfinite(mean) else None


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Evaluation without gradients; afterwards every module's mode and every random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    cuda: Any = torch.cuda
    devices = [cuda.current_device()] if cuda.is_available() and cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        _reshard(model)


@contextmanager
def in_precision_of_weights(model: Any) -> Iterator[None]:
    """Forward passes in the weights' own precision, whatever surrounds them, and past accelerate's own autocast.

    accelerate replaces `forward` of a model that it prepares by one that enters autocast, and keeps the former beside
    it. FlashAttention takes 16 bits alone, so that in its place float32 weights attend by torch's kernel.
    """
    weight = next(iter(model.parameters()))
    wrapped = [(module, module.forward) for module in model.modules() if "_original_forward" in vars(module)]
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    kernels = [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]
    flash = [(config, kernel) for config, kernel in kernels if weight.dtype == torch.float32 and "flash" in str(kernel)]
    try:
        for module, _ in wrapped:
            module.forward = module._original_forward
        for config, _ in flash:
            config._attn_implementation = "sdpa"
        known = torch.amp.is_autocast_available(weight.device.type)
        with torch.autocast(weight.device.type, enabled=False) if known else nullcontext():
            yield
    finally:
        for module, forward in wrapped:
            module.forward = forward
        for config, kernel in flash:  # the whole model's before those of its parts, which it sets too
            config._attn_implementation = kernel


def _reshard(model: Any) -> None:
    """A forward pass without a backward leaves an FSDP2 root gathered, which its next step must not find."""
    if not in_process_group():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
