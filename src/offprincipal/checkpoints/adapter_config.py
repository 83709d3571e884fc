"""The settings in a PEFT adapter's `adapter_config.json`, checked: every field is hostile input."""

import math
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError

from offprincipal.checkpoints.hostile import MOST_OF_CONFIG, read_json
from offprincipal.errors import CheckpointError

CONFIG = "adapter_config.json"
KINDS = ("LORA", "ADALORA", "MISS", "SHIRA", "IA3", "LN_TUNING", "TRAINABLE_TOKENS")
_RESIDUAL_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_NOT_ONE_UPDATE = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
_LONGEST_PATTERN = 300
_NESTED = re.compile(r"\)[*+{]")
_MOST_REPEATS, _MOST_OPTIONS = 3, 4  # with these a name of 250 characters takes a second at the worst
_MOST_PATTERNS = 1000


class AdapterConfig(BaseModel):
    """The fields that decide an adapter's update; the others are about its training."""

    model_config = ConfigDict(strict=True, extra="ignore")

    peft_type: str
    base_model_name_or_path: str | None = None
    r: int = Field(8, gt=0, lt=2**31)
    lora_alpha: FiniteFloat = 8
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None
    use_rslora: bool | None = False
    use_dora: bool | None = False
    fan_in_fan_out: bool | None = False
    init_lora_weights: bool | str | None = True
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    token_indices: list[int] | None = None
    init_r: int = Field(12, gt=0, lt=2**31)
    init_weights: bool | str | None = True

    @property
    def residual_init(self) -> str | None:
        """The name of an initialisation that takes its start out of the base: 'pissa'; None for the others."""
        init = self.init_lora_weights
        if self.peft_type != "LORA" or not isinstance(init, str):
            return None
        return init if init.lower().startswith(_RESIDUAL_INITS) else None

    def parameters(self, module: str) -> list[str]:
        """The parameters that are adapted in a module of the model, by `target_parameters`."""
        targets = [target.rpartition(".")[::2] for target in sorted(self.target_parameters or ())]
        return [f"{module}.{name}" for owner, name in targets if owner and f".{module}".endswith(f".{owner}")]

    def tokens(self, module: str) -> list[int]:
        """The rows of an embedding or head that are trained."""
        indices = self.token_indices or self.trainable_token_indices or []
        if not isinstance(indices, dict):
            return indices
        return next((rows for name, rows in indices.items() if f".{module}".endswith(f".{name}")), [])

    def rank(self, module: str) -> int:
        """The rank that an adapted module should have."""
        return int(_matching(self.rank_pattern, module, self.r))

    def scale(self, module: str, rank: int) -> float:
        """What BA is multiplied by: α/r, or α/√r for rsLoRA; AdaLoRA's is fixed by the rank that it began with."""
        if self.peft_type == "ADALORA":
            return (self.lora_alpha if self.lora_alpha > 0 else self.init_r) / (self.init_r + 1e-5)
        alpha = float(_matching(self.alpha_pattern, module, self.lora_alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_settings(folder: Path) -> AdapterConfig:
    """The settings of the adapter in a folder.

    Raises:
        CheckpointError: they cannot be read, are of another kind of adapter, or make no sense.
    """
    path = folder / CONFIG
    content = read_json(path, MOST_OF_CONFIG)
    kind = content.get("peft_type")
    if isinstance(kind, str) and kind not in KINDS:
        raise _unread(path, f"is of peft_type {kind[:40]!r}")
    if kind == "ADALORA":  # its pattern is of the triplets that are left, which the file has alone
        content = {key: value for key, value in content.items() if key != "rank_pattern"}
    try:
        settings = AdapterConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path} has a bad {field}: {first['msg']}. Save the adapter again") from error
    asked = [name for name in _NOT_ONE_UPDATE if content.get(name)]
    if asked:
        raise _unread(path, f"sets {asked[0]}")
    if kind == "MISS" and settings.init_weights == "bat":
        raise _unread(path, "has init_weights 'bat'")
    patterns = (*(settings.rank_pattern or {}), *(settings.alpha_pattern or {}))
    if len(patterns) > _MOST_PATTERNS:
        raise CheckpointError(f"{path} has {len(patterns)} patterns. Do not trust it")
    for pattern in patterns:
        _require_harmless(pattern, path)
    return settings


def _unread(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {what}, which is not supported (only {', '.join(KINDS)}, with DoRA and the initialisations of LoRA): "
        "merge the adapter into its base and give the merged model"
    )


def _matching(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT decides it."""
    matches = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matches, default)


def _require_harmless(pattern: str, path: Path) -> None:
    """Refuse a regular expression that is invalid, or that could take forever."""
    repeats, options = sum(map(pattern.count, "*+{")), len(re.findall(r"(?<!\()\?", pattern))
    harmless = repeats <= _MOST_REPEATS and options <= _MOST_OPTIONS and len(pattern) <= _LONGEST_PATTERN
    if not harmless or _NESTED.search(pattern):
        raise CheckpointError(
            f"{path} has the pattern {pattern[:60]!r}, which is too complex: name the modules plainly"
        )
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has the pattern {pattern!r}, which is not a regular expression ({error})"
        ) from error
