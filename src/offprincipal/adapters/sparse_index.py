"""Which entries of a parameter are active, in few bytes: a bit for every entry, or 16 bits for every active one.

Offsets of 16 bits count from the start of a stretch of 65536 entries; before them stands, for each stretch, where its
offsets stop. At a density below 1/16 they are smaller than bits. Knows nothing of what is done with the entries.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from offprincipal.geometry.bits import pack

STRETCH = 1 << 16
_WORDS_OF_A_STOP = 4
_AT_ONCE = 16  # stretches
_WORDS = _AT_ONCE * STRETCH // 64


def index_of(mask: Tensor) -> Tensor:
    """The active entries of a mask: int16, offsets within stretches; or int64, bits; whichever is smaller.

    >>> index_of(torch.tensor([True, False, True])), index_of(torch.arange(200) == 70)
    (tensor([5]), tensor([ 1,  0,  0,  0, 70], dtype=torch.int16))
    """
    if torch.count_nonzero(mask).item() * 16 > mask.numel():
        return torch.from_numpy(pack(mask.cpu().numpy()).view(np.int64)).to(mask.device)
    entries = torch.nonzero(mask.flatten()).view(-1).cpu().numpy()
    stops = np.searchsorted(entries, np.arange(1, _stretches(mask.numel()) + 1) * STRETCH)
    parts = stops.astype(np.int64).view(np.int16), (entries % STRETCH).astype(np.uint16).view(np.int16)
    return torch.from_numpy(np.concatenate(parts)).to(mask.device)


def entries_of(index: Tensor, numel: int) -> Tensor:
    """The active entries, rising, int64.

    >>> entries_of(torch.tensor([5]), 3)
    tensor([0, 2])
    """
    return torch.cat(list(blocks_of(index, numel)))


def blocks_of(index: Tensor, numel: int) -> Iterator[Tensor]:
    """The active entries in turn, those of some stretches at a time, so that few indices of 64 bits are held at once.

    >>> [block.tolist() for block in blocks_of(index_of(torch.arange(70000) % 40000 == 7), 70000)]
    [[7, 40007]]
    """
    if index.dtype == torch.int64:
        for first in range(0, len(index), _WORDS):
            yield _set_bits(index[first : first + _WORDS].view(torch.uint8)) + 64 * first
        return
    stretches = _stretches(numel)
    stops, offsets = index[: _WORDS_OF_A_STOP * stretches].view(torch.int64), index[_WORDS_OF_A_STOP * stretches :]
    ends = [0, *stops.cpu().tolist()]
    for first in range(0, stretches, _AT_ONCE):
        last = min(first + _AT_ONCE, stretches)
        counts = torch.tensor(ends[first + 1 : last + 1]) - torch.tensor(ends[first:last])
        starts = torch.repeat_interleave(torch.arange(first, last) * STRETCH, counts).to(index.device)
        yield (offsets[ends[first] : ends[last]].long() & 0xFFFF) + starts


def _set_bits(packed: Tensor) -> Tensor:
    """Which bits of bytes are set, from the lowest of the first on; numpy is seven times as fast as torch on a CPU."""
    if packed.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(np.unpackbits(packed.numpy(), bitorder="little").view(np.bool_)))
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return torch.nonzero(((packed[:, None] >> shifts) & 1).flatten()).view(-1)


def count_active(index: Tensor, numel: int) -> int:
    """How many entries are active.

    >>> count_active(torch.tensor([5]), 3), count_active(index_of(torch.arange(200) == 70), 200)
    (2, 1)
    """
    if index.dtype == torch.int16:
        return index.numel() - _WORDS_OF_A_STOP * _stretches(numel)
    words = index.cpu().numpy().view(np.uint64)  # of a signed number the bits of its magnitude would be counted
    return int(np.bitwise_count(words).sum())


def _stretches(numel: int) -> int:
    return -(-numel // STRETCH)
