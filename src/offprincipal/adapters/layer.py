"""The PEFT layer of an adapted matrix: a further adapter of the same settings gets factors of the same kind.

TRL makes one, called `ref`, and copies the parameters of the adapter that it was given into it, one by one: that is its
reference policy. Other settings, such as those of `add_weighted_adapter`, which writes its factors itself, give PEFT's.
"""

from typing import Any

from peft.tuners import lora
from torch import Tensor, nn

from offprincipal.adapters.factors import Factor, FrozenFactor
from offprincipal.adapters.record import RecordedLoraConfig
from offprincipal.errors import AdapterError


class AdaptedLinear(lora.Linear):
    """PEFT's LoRA layer, whose adapters with our configuration share the kind of the first one's factors."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: lora.LoraConfig, **kwargs: Any) -> None:
        """As PEFT's; a further adapter with the record of ours starts at zero, and trains as the first one does.

        Raises:
            AdapterError: it has another rank than the first.
        """
        first = next(iter(self.lora_A), None)
        own = isinstance(config, RecordedLoraConfig) and config.record is not None
        if first is None or first == adapter_name or not own:
            super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
            return
        if r != self.r[first]:
            raise AdapterError(f"a further adapter has the rank of the first, {self.r[first]}, not {r}: adapt anew")
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        a_alone = isinstance(self.lora_B[first], FrozenFactor)  # and so it is A that is zero at the start
        for factors in (self.lora_A, self.lora_B):
            ours, theirs = factors[first], factors[adapter_name]
            assert isinstance(theirs, nn.Linear)
            if a_alone:
                nn.init.zeros_(theirs.weight)
            if isinstance(ours, (Factor, FrozenFactor)):
                factors[adapter_name] = ours.anew(theirs.weight.detach())
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
