"""Many checkpoints of one run, compared with a random walk."""

from offprincipal.trajectories.trajectory import Trajectory, trajectory

__all__ = ["Trajectory", "trajectory"]
