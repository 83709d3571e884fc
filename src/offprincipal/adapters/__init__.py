"""Fine-tuning that respects the geometry: parametrizations and optimizers that any torch or TRL run can take.

torch is imported with this package; transformers and PEFT are not.
"""

from offprincipal.adapters.isospectral import Isospectral, IsospectralAdamW, IsospectralMuon

__all__ = ["Isospectral", "IsospectralAdamW", "IsospectralMuon"]
