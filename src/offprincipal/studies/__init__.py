"""Studies: experiments as a graph of stages, each done once. Knows no claim: `paper` has those, and the profiles."""

from offprincipal.studies.running import pending, run_profile

__all__ = ["pending", "run_profile"]
