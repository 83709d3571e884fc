"""A compact index of the active entries of a parameter: one bit per entry, or 16 bits per active entry.

The parameter is divided into stretches of 65536 entries. The 16-bit form holds, for each stretch, the end of its part
of the list as an int64, and then the list of offsets of active entries within their stretches. It is smaller than bits
at densities below 1/16. Knows nothing of how the entries are used.
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
    """The index of a mask, in the smaller of the two forms.

    Args:
        mask: bool, any shape, on any device.

    Returns:
        int16, ends and offsets; or int64, 64 bits to a word. On the device of the mask.

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
    """The positions of the active entries in the flattened parameter.

    Args:
        index: from `index_of`.
        numel: entries of the parameter.

    Returns:
        int64, (active,), ascending.

    >>> entries_of(torch.tensor([5]), 3)
    tensor([0, 2])
    """
    return torch.cat(list(blocks_of(index, numel)))


def blocks_of(index: Tensor, numel: int) -> Iterator[Tensor]:
    """The positions of the active entries in blocks of 16 stretches, so that few int64 positions are held at once.

    Args:
        index: from `index_of`.
        numel: entries of the parameter.

    Returns:
        An iterator over blocks, int64, (active in the block,), ascending.

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
    """Positions of the set bits of bytes, least significant bit first; numpy is 7 times as fast as torch on a CPU."""
    if packed.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(np.unpackbits(packed.numpy(), bitorder="little").view(np.bool_)))
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return torch.nonzero(((packed[:, None] >> shifts) & 1).flatten()).view(-1)


def count_active(index: Tensor, numel: int) -> int:
    """The number of active entries.

    Args:
        index: from `index_of`.
        numel: entries of the parameter.

    >>> count_active(torch.tensor([5]), 3), count_active(index_of(torch.arange(200) == 70), 200)
    (2, 1)
    """
    if index.dtype == torch.int16:
        return index.numel() - _WORDS_OF_A_STOP * _stretches(numel)
    words = index.cpu().numpy().view(np.uint64)  # for signed numbers it would count bits of the absolute value
    return int(np.bitwise_count(words).sum())


def _stretches(numel: int) -> int:
    return -(-numel // STRETCH)
