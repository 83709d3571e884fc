"""The monitor: measures weights and policy during training, each figure with its null.

`Monitor` works in any training loop; transformers is imported only by its callback.
"""

from offprincipal.training.monitor.monitor import Monitor
from offprincipal.training.monitor.table import read_monitor

__all__ = ["Monitor", "read_monitor"]
