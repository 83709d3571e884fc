"""Randomness by purpose: a generator for each, so that what was drawn before changes nothing.

Knows nothing of what is drawn.
"""

import hashlib

import torch


def generator_of(seed: int, *what: object) -> torch.Generator:
    """A generator for one purpose, whatever was drawn before.

    Args:
        what: the purpose; its `repr` decides, with the seed. Records of interventions are undone by what it gives.

    >>> first, again = (torch.rand(1, generator=generator_of(0, "layer", 3)) for _ in range(2))
    >>> bool(first == again), bool(first == torch.rand(1, generator=generator_of(0, "layer", 4)))
    (True, False)
    """
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
