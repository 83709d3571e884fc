"""Randomness by purpose: a seed for each, so that what was drawn before changes nothing.

Knows nothing of what is drawn.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_of(seed: int, *what: object) -> int:
    """A 63-bit seed for one purpose, the same on every machine.

    Args:
        what: the purpose; its `repr` decides, with the seed. Records of interventions are undone by what it gives.

    >>> seed_of(0, "layer", 3) == seed_of(0, "layer", 3), seed_of(0, "layer", 3) == seed_of(0, "layer", 4)
    (True, False)
    """
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_of(seed: int, *what: object) -> "torch.Generator":
    """A generator on the CPU for one purpose, seeded by `seed_of`.

    >>> first, again = (torch.rand(1, generator=generator_of(0, "layer", 3)) for _ in range(2))
    >>> bool(first == again)
    True
    """
    import torch  # here, so that seeds alone need no torch

    return torch.Generator().manual_seed(seed_of(seed, *what))
