"""KL divergences between policies on fixed sequences, exact over the vocabulary, from one forward pass each.

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
_MOST_NUMBERS = 1 << 26  # most float32 log-probabilities of one policy in memory: 256 MiB


@dataclass(frozen=True)
class PaddedSequences:
    """Token sequences of different lengths, padded on the right.

    Args:
        ids: (s, length), int64.
        lengths: (s,), int64, at least 2.
        counted: (s, length), bool: tokens whose prediction counts; never padding or the first token of a sequence.
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
    """The sequences on which divergences are measured.

    At most 16 rows are taken, spread evenly over those given, with the last 64 tokens of each; fewer if their float32
    log-probabilities would need more than 256 MiB.

    Args:
        rows: token ids; rows in which no token counts are left out.
        vocabulary: size of the model's vocabulary; None: unknown, so memory is not bounded.
        counted: of the shape of `rows`, the tokens that count, such as those of completions; None: all but the first of
            each row, which is not predicted.

    Raises:
        ArgumentError: no token counts, or a token is not in the vocabulary.

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
    """The rows of a padded batch without the padding.

    Args:
        ids: (s, length), int64.
        values: (s, length), bool.
        mask: (s, length), true at tokens; None: there is no padding.

    Returns:
        The rows of `ids`, and those of `values`.

    >>> unpadded(torch.tensor([[0, 5, 6]]), torch.tensor([[False, False, True]]), torch.tensor([[0, 1, 1]]))
    ([[5, 6]], [[False, True]])
    """
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    rows = [line[keep].tolist() for line, keep in zip(ids, kept, strict=True)]
    return rows, [line[keep].tolist() for line, keep in zip(values, kept, strict=True)]


def vocabulary_of(model: Any) -> int | None:
    """Size of a transformers model's vocabulary; None for other modules."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


def log_probabilities(model: Any, sequences: PaddedSequences) -> Tensor:
    """The next-token log-probabilities of a policy at every counted token, given the tokens before it.

    They are computed in the precision of the weights even if training uses bfloat16 autocast: rounding of the
    activations to bfloat16 causes a divergence of about 1e-5, far above that of one step. The mode of the model and all
    random states are restored. All processes of a sharded model must call this.

    Args:
        model: called with `input_ids` and `attention_mask`; returns logits, (s, length, vocabulary), or an object with
            them as `.logits`.
        sequences: the tokens.

    Returns:
        float32, (positions, vocabulary), on the model's device; one position for each counted token.

    Raises:
        ModelError: the model returns no logits for these inputs, or is an encoder–decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder and a decoder, so one sequence does not determine its predictions"
        )
    device = next(iter(model.parameters())).device
    inputs: dict[str, Any] = {"input_ids": sequences.ids.to(device), "attention_mask": sequences.mask.to(device)}
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False
    with undisturbed(model), in_precision_of_weights(model):
        try:
            output = model(**inputs)
        except Exception as error:  # any error that a model raises if it needs other inputs
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"{type(model).__name__} cannot be called with only input_ids and attention_mask: {reason}"
            ) from error
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise ModelError(
                f"{type(model).__name__} gives no logits for input_ids and attention_mask: monitor it without sequences"
            )
        log_p: Tensor = logits[:, :-1][sequences.counted[:, 1:].to(device)].float().log_softmax(-1)
    return log_p


def mean_divergence(log_p: Tensor, log_q: Tensor) -> float | None:
    """KL(p‖q) in nats, mean over positions; None if it is not finite.

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
    """A context of evaluation without gradients; afterwards module modes and random states are restored."""
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
    """A context of forward passes in the precision of the weights: without autocast, including accelerate's.

    accelerate replaces `forward` of a model by one that enters autocast, and keeps the original as
    `_original_forward`. FlashAttention needs 16-bit inputs, so models with float32 weights use torch's attention here.
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
        for config, kernel in flash:  # the whole model first, because setting it also sets its parts
            config._attn_implementation = kernel


def _reshard(model: Any) -> None:
    """Shard FSDP2 modules again: a forward pass without a backward pass leaves the root gathered."""
    if not in_process_group():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
