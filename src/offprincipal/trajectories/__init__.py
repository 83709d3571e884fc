"""Many checkpoints of one run, and the random walk that would explain them."""

from offprincipal.trajectories.trajectory import Trajectory, trajectory

__all__ = ["Trajectory", "trajectory"]
