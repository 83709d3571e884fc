"""Everything about the paper: its claims and their rules, the negative controls, and the profiles of its studies."""

from offprincipal.paper.profile import Profile, load_profile, profile_names

__all__ = ["Profile", "load_profile", "profile_names"]
