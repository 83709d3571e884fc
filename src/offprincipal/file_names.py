"""The names of the files and folders that several rooms write or look for, each once."""

SUMMARY = "summary.json"  # of a comparison; its tables are `tables.TABLES`
JOURNAL = "journal.jsonl"  # of one that is not complete
STUDY = "study.json"
REPORT = "report.html"
TRAJECTORY = "trajectory.json"
TRAJECTORY_PAGE = "trajectory.html"
TRAJECTORY_JOURNAL = "trajectory.journal.jsonl"
GATES = "gates.json"
PREFLIGHT = "preflight.json"
PREFLIGHT_PAGE = "preflight.html"
PRECISION = "precision.json"  # of a study's runs
MONITOR = "monitor.parquet"
INTERVENTION = "intervention.json"
UNDONE = "undo.json"

RECORD = "run.json"  # of a training run that is complete; beside it:
STARTED = "started.json"  # in CHECKPOINTS, of one that is not
CHECKPOINTS = "checkpoints"
DELTAS = "deltas"
MASTERS = "masters"
