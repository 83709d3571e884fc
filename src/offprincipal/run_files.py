"""The names of what lies in a run's folder."""

RECORD = "run.json"  # of a run that is complete
STARTED = "started.json"  # in CHECKPOINTS, of one that is not
CHECKPOINTS = "checkpoints"
DELTAS = "deltas"
MASTERS = "masters"
