"""RL-native fine-tuning: masks of a model's entries, the optimizer that trains under them, and adapters of PEFT.

torch is imported with this package; peft only when an adapter is made.
"""

from offprincipal.adapters.choosing import KINDS, Kind, make_masks
from offprincipal.adapters.masks import Masks
from offprincipal.adapters.sparse_adamw import SparseAdamW

__all__ = ["KINDS", "Kind", "Masks", "SparseAdamW", "make_masks"]
