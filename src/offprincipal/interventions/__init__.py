"""Interventions: rotate or reorder a model's weights without changing its function, and undo that after training.

What training does to the weights in other coordinates shows whether it follows the geometry of the base. torch is
imported with this package; transformers only when a model is opened.
"""

from offprincipal.interventions.applying import intervene
from offprincipal.interventions.layers import parse_layers
from offprincipal.interventions.record import InterventionRecord, read_record
from offprincipal.interventions.undoing import undo

__all__ = ["InterventionRecord", "intervene", "parse_layers", "read_record", "undo"]
