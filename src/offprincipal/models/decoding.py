"""Completions sampled from a model, with the exact entropy and divergence at every token.

One batch of prompts is read once; all completions of a prompt continue from the same cache, and finished ones leave the
batch. Knows nothing of tasks.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offprincipal.errors import ModelError
from offprincipal.models.divergence import kl_per_token
from offprincipal.models.opening import LanguageModel

_DROP_SHARE = 0.25


@dataclass
class Completions:
    """Completions of one batch of prompts, row by row: the greedy one of each prompt, then its samples.

    Args:
        ids: tokens of each completion, without the one that ended it; ends: that one, None if it was cut off.
        tokens: generated tokens over all sampled rows, the ending ones included.
        entropy: the sum over those tokens of the policy's entropy, in nats.
        divergence: the sum of KL(policy‖reference) there, in nats; None without a reference.
    """

    ids: list[list[int]]
    tokens: int
    entropy: float
    divergence: float | None
    ends: list[int | None]

    @property
    def whole(self) -> list[list[int]]:
        """Tokens of each completion, with the one that ended it."""
        return [[*ids, *([] if end is None else [end])] for ids, end in zip(self.ids, self.ends, strict=True)]


class _Decoder:
    """One model's cache over a batch of left-padded rows."""

    def __init__(self, model: Any) -> None:
        self._model = model
        taken = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in taken
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}  # a prompt's others are not read
        self._cache: Any = None

    def log_probabilities(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Of the next token; (rows, vocabulary). `mask` covers what was read before, and `ids`.

        In float64: small divergences are sums of terms that cancel.
        """
        extra: dict[str, Any] = dict(self._last)
        if self._positions:
            extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model(input_ids=ids, attention_mask=mask, past_key_values=self._cache, use_cache=True, **extra)
        self._cache = getattr(output, "past_key_values", None)
        if self._cache is None:
            raise ModelError(f"{type(self._model).__name__} keeps no key-value cache: choose a model that does")
        log_p: Tensor = output.logits[:, -1].double().log_softmax(-1)
        return log_p

    def repeat(self, times: int) -> None:
        self._cache.batch_repeat_interleave(times)

    def keep(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)


@torch.no_grad()
def complete(
    language_model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    samples: int,
    max_new_tokens: int,
    generator: torch.Generator,
    reference: LanguageModel | None = None,
    temperature: float = 1.0,
) -> Completions:
    """One greedy completion and `samples` sampled ones for each prompt.

    The random numbers are drawn before the first token, by row and position: two models with the same generator state
    see the same ones, so that their difference is measured on common noise.

    Args:
        language_model: the policy.
        prompts: token ids, of similar lengths at best.
        samples: sampled completions for each prompt.
        max_new_tokens: the longest completion.
        generator: on the CPU; advanced by the call.
        reference: what the divergence is measured to; its vocabulary is the policy's.
        temperature: of the sampling; entropy and divergence are the policy's own, at temperature 1.

    Raises:
        ModelError: a model has no key-value cache.
    """
    device = language_model.device
    group = 1 + samples
    rows = len(prompts) * group
    uniform = torch.rand(rows, max_new_tokens, generator=generator, dtype=torch.float64).to(device)
    greedy = torch.arange(rows, device=device) % group == 0
    decoders = [_Decoder(m.model) for m in (language_model, reference) if m is not None]
    eos = torch.tensor(language_model.eos_ids, device=device)

    ids, mask = _left_padded(prompts, language_model.tokenizer.pad_token_id, device)  # (prompts, length)
    scores = [decoder.log_probabilities(ids, mask).repeat_interleave(group, 0) for decoder in decoders]
    for decoder in decoders:
        decoder.repeat(group)
    mask = mask.repeat_interleave(group, 0)  # (rows, length)

    row = torch.arange(rows, device=device)  # which completion each live row is
    written = torch.full((rows, max_new_tokens), int(eos[0]), device=device)
    running = torch.ones(rows, dtype=torch.bool, device=device)  # over live rows
    tokens, entropy, divergence = 0, 0.0, 0.0
    for position in range(max_new_tokens):
        policy = scores[0]
        counted = running & ~greedy[row]
        tokens += int(counted.sum())
        entropy += float(_entropy(policy)[counted].sum())
        if reference is not None:
            divergence += float(kl_per_token(policy[counted], scores[1][counted]).sum())
        token = torch.where(greedy[row], policy.argmax(-1), _draw(policy / temperature, uniform[row, position]))
        written[row[running], position] = token[running]
        running = running & ~torch.isin(token, eos)
        if not bool(running.any()) or position == max_new_tokens - 1:
            break
        if float((~running).float().mean()) >= _DROP_SHARE:
            kept = running.nonzero()[:, 0]
            row, token, mask, running = row[kept], token[kept], mask[kept], running[kept]
            for decoder in decoders:
                decoder.keep(kept)
        mask = torch.cat([mask, mask.new_ones(len(row), 1)], dim=1)
        scores = [decoder.log_probabilities(token[:, None], mask) for decoder in decoders]

    ends = set(eos.tolist())
    lines = written.tolist()
    lengths = [next((i for i, t in enumerate(line) if t in ends), len(line)) for line in lines]
    completions = [line[:length] for line, length in zip(lines, lengths, strict=True)]
    ended = [line[length] if length < len(line) else None for line, length in zip(lines, lengths, strict=True)]
    return Completions(completions, tokens, entropy, None if reference is None else divergence, ended)


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)  # the clamp makes 0·(-inf) zero


def _draw(log_p: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-transform sampling: the first token whose cumulative probability exceeds the uniform number."""
    cumulative = log_p.exp().cumsum(-1)
    token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return token.clamp(max=log_p.shape[-1] - 1)
