"""Interventions: rotate or reorder a model's weights so that its function stays, prove it, and undo it after training.

What training does to weights in other coordinates tells whether it follows the geometry of the base. torch is imported
with this package; transformers only when a model is opened.
"""

from offprincipal.interventions.applying import intervene
from offprincipal.interventions.layers import parse_layers
from offprincipal.interventions.record import InterventionRecord, read_record
from offprincipal.interventions.undoing import undo

__all__ = ["InterventionRecord", "intervene", "parse_layers", "read_record", "undo"]
