"""Which entries of a parameter are active, in few bytes: a bit for every entry, or 16 bits for every active one.

Offsets of 16 bits count from the start of a stretch of 65536 entries; before them stands, for each stretch, where its
offsets stop. At a density below 1/16 they are smaller than bits. Knows nothing of what is done with the entries.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offprincipal.geometry.scan import pack

STRETCH = 1 << 16
_WORDS_OF_A_STOP = 4
Stretches = tuple[NDArray[np.int64], NDArray[np.uint16]]


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
    if index.dtype == torch.int16:
        stops, offsets = stretches_of(index.cpu(), numel)
        starts = np.repeat(np.arange(len(stops)) * STRETCH, np.diff(stops, prepend=0))
        return torch.from_numpy(starts + offsets).to(index.device)
    shifts = torch.arange(64, device=index.device)
    return torch.nonzero(((index[:, None] >> shifts) & 1).flatten()[:numel]).view(-1)


def stretches_of(index: Tensor, numel: int) -> Stretches:
    """Where the offsets of each stretch stop, and all offsets, of an int16 index on a CPU; both share its memory.

    >>> [part.tolist() for part in stretches_of(index_of(torch.arange(70000) % 40000 == 7), 70000)]
    [[2, 2], [7, 40007]]
    """
    start = _WORDS_OF_A_STOP * _stretches(numel)
    words = index.numpy()
    return words[:start].view(np.int64), words[start:].view(np.uint16)


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
