"""The paper's claims, each judged twice by a fixed rule: as published, and against what could explain it away.

One function a claim. A rule reads tables, never a model, and its margins are constants in `rules`: they were fixed
before the first study ran. The run is the unit of every interval, or the pair of runs that share a seed.
"""

from offprincipal.paper.claims import (  # noqa: F401  # the claims enter themselves
    c01_c06_signatures,
    c07_intervention,
    c08_storage,
    c09_kl_bound,
    c10_spectral_bound,
    c11_masks,
    c12_low_rank,
    c13_transfer,
    c14_trajectories,
)
from offprincipal.paper.claims.evidence import SOURCES, Evidence
from offprincipal.paper.claims.registry import CLAIMS, judge
from offprincipal.paper.claims.rules import Judgement, Verdict, decide

__all__ = ["CLAIMS", "SOURCES", "Evidence", "Judgement", "Verdict", "decide", "judge"]
