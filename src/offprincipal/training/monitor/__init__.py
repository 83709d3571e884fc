"""The monitor: weights and policy measured while they are trained, each figure beside its null.

`Monitor` serves any loop; transformers is imported only with its callback.
"""

from offprincipal.training.monitor.monitor import Monitor
from offprincipal.training.monitor.table import read_monitor

__all__ = ["Monitor", "read_monitor"]
