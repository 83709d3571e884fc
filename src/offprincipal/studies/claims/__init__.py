"""The paper's claims, each judged twice by a fixed rule: as published, and against what could explain it away.

One function a claim. A rule reads tables, never a model, and its margins are constants in `rules`: they were fixed
before the first study ran. An interval is a bootstrap over matrices, or over steps where a claim speaks of steps,
paired between runs; it says nothing of other seeds.
"""

from offprincipal.studies.claims import bounds, causal, leash, precision, signatures  # noqa: F401  # the claims enter themselves
from offprincipal.studies.claims.evidence import SOURCES, Evidence
from offprincipal.studies.claims.registry import CLAIMS, judge
from offprincipal.studies.claims.rules import Judgement, Verdict, decide

__all__ = ["CLAIMS", "SOURCES", "Evidence", "Judgement", "Verdict", "decide", "judge"]
