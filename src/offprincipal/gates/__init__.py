"""The gates: what needs forward passes. Divergence from the base, the Fisher form, and the curvature of directions.

torch and transformers are imported with this package.
"""

from offprincipal.gates.measure import Gates, GateSettings, measure_gates
from offprincipal.models.divergence import kl_per_token
from offprincipal.models.fisher import Batch, fisher_per_token, fisher_quadratic

__all__ = [
    "Batch",
    "GateSettings",
    "Gates",
    "fisher_per_token",
    "fisher_quadratic",
    "kl_per_token",
    "measure_gates",
]
