"""The PEFT layer of an adapted matrix: a further adapter of the same settings gets factors of the same kind.

TRL makes one, called `ref`, and copies the parameters of the adapter that it was given into it, one by one: that is its
reference policy.
"""

import copy
from typing import Any

from peft.tuners import lora
from torch import Tensor

from offprincipal.adapters.factors import Factor, FrozenFactor
from offprincipal.adapters.record import RecordedLoraConfig


class AdaptedLinear(lora.Linear):
    """PEFT's LoRA layer, whose adapters with our configuration share the kind of the first one's factors."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: lora.LoraConfig, **kwargs: Any) -> None:
        first = next(iter(self.lora_A), None)
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        if first is None or first == adapter_name or not isinstance(config, RecordedLoraConfig):
            return
        for factors in (self.lora_A, self.lora_B):
            if isinstance(factors[first], (Factor, FrozenFactor)):
                factors[adapter_name] = copy.deepcopy(factors[first])
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, which reads a factor for its type before it calls it: what acts is computed once."""
        factors = [factor for side in (self.lora_A, self.lora_B) for factor in side.values()]
        held = [factor for factor in factors if isinstance(factor, Factor)]
        for factor in held:
            factor.hold()
        try:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        finally:
            for factor in held:
                factor.release()
