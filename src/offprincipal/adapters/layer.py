"""A PEFT LoRA layer in which another adapter with the same settings gets factors of the same kind as the first.

TRL adds such an adapter, named `ref`, and copies the parameters of the trained adapter into it one by one, to serve as
the reference policy. Adapters with other configurations get PEFT's own factors; `add_weighted_adapter`, for example,
makes one and writes its factors itself.
"""

from typing import Any

from peft.tuners import lora
from torch import Tensor, nn

from offprincipal.adapters.factors import Factor, FrozenFactor
from offprincipal.adapters.record import RecordedLoraConfig
from offprincipal.errors import AdapterError


class AdaptedLinear(lora.Linear):
    """PEFT's LoRA layer; adapters with a `RecordedLoraConfig` all have factors of the kind of the first one."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: lora.LoraConfig, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does; another adapter with our record starts at zero and is trained like the first.

        Args:
            adapter_name, r, lora_alpha, config, kwargs: as in PEFT.

        Raises:
            AdapterError: its rank differs from that of the first adapter.
        """
        first = next(iter(self.lora_A), None)
        own = isinstance(config, RecordedLoraConfig) and config.record is not None
        if first is None or first == adapter_name or not own:
            super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
            return
        if r != self.r[first]:
            raise AdapterError(
                f"another adapter has the rank of the first, {self.r[first]}, not {r}: adapt the base again"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        a_alone = isinstance(self.lora_B[first], FrozenFactor)  # then A has to be zero at the start
        for factors in (self.lora_A, self.lora_B):
            ours, theirs = factors[first], factors[adapter_name]
            assert isinstance(theirs, nn.Linear)
            if a_alone:
                nn.init.zeros_(theirs.weight)
            if isinstance(ours, (Factor, FrozenFactor)):
                factors[adapter_name] = ours.another(theirs.weight.detach())
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in PEFT, which reads a factor's dtype and then calls it: `hold` avoids computing it twice."""
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
