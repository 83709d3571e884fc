"""Interventions: rotate or reorder a model's weights without changing its function, and undo that after training.

Training the same function in other coordinates shows whether updates follow the geometry of the base. Importing this
package imports torch; transformers is imported when a model is opened.
"""

from offprincipal.interventions.applying import intervene
from offprincipal.interventions.layers import parse_layers
from offprincipal.interventions.record import InterventionRecord, read_record
from offprincipal.interventions.undoing import undo

__all__ = ["InterventionRecord", "intervene", "parse_layers", "read_record", "undo"]
