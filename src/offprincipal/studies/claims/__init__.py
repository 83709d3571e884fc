"""The paper's claims, each judged twice by a fixed rule: as published, and against what could explain it away.

One function a claim. A rule reads tables, never a model, and its margins are constants in `rules`: they were fixed
before the first study ran. The run is the unit of every interval, or the pair of runs that share a seed.
"""

from offprincipal.studies.claims import (  # noqa: F401  # the claims enter themselves
    bounds,
    causal,
    kl_bound,
    low_rank,
    masks,
    precision,
    signatures,
    trajectories,
    transfer,
)
from offprincipal.studies.claims.evidence import SOURCES, Evidence
from offprincipal.studies.claims.registry import CLAIMS, judge
from offprincipal.studies.claims.rules import Judgement, Verdict, decide

__all__ = ["CLAIMS", "SOURCES", "Evidence", "Judgement", "Verdict", "decide", "judge"]
