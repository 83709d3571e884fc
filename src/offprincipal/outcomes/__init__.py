"""Outcomes of fine-tuning runs: rows of `outcomes.parquet` and `kl_curves.parquet` in, groups of runs and figures out.

Knows nothing of folders, claims or pages; claims are judged and figures drawn from the same groups.
"""

from typing import Any

Row = dict[str, Any]
