"""Studies: train, compare and judge the paper's claims, as a graph of stages declared in a profile."""

from offprincipal.studies.graph import pending, run_profile, training_stages
from offprincipal.studies.profile import Profile, load_profile, profile_names

__all__ = ["Profile", "load_profile", "pending", "profile_names", "run_profile", "training_stages"]
