"""Constrained fine-tuning: masks of weight entries, optimizers that train under a constraint, and PEFT adapters.

Importing this package imports torch; peft is imported only when an adapter is made.
"""

from offprincipal.adapters.adapting import adapt
from offprincipal.adapters.choosing import KINDS, Kind, make_masks
from offprincipal.adapters.isospectral import Isospectral, IsospectralAdamW, IsospectralMuon
from offprincipal.adapters.shira_model import shira
from offprincipal.adapters.sparse_adamw import SparseAdamW
from offprincipal.adapters.weight_masks import Masks

__all__ = [
    "KINDS",
    "Isospectral",
    "IsospectralAdamW",
    "IsospectralMuon",
    "Kind",
    "Masks",
    "SparseAdamW",
    "adapt",
    "make_masks",
    "shira",
]
