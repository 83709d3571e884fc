"""Fine-tuning methods for RL's geometry: PEFT adapters that train here and load anywhere."""

from offprincipal.adapters.adapt import adapt

__all__ = ["adapt"]
