"""Opening language models: weights in float32, a tokenizer that can pad and stop.

Knows nothing of tasks or runs.
"""

import hashlib
import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from offprincipal.assets import EMBEDDED, embedded_base
from offprincipal.checkpoints.adapter import is_adapter
from offprincipal.errors import ModelError, install_command
from offprincipal.hub_connection import asked_once, is_cached
from offprincipal.models.gguf import SUFFIX, folder_of
from offprincipal.models.quiet import quiet_libraries
from offprincipal.models.tokenizer_guard import TOKENIZER, require_tame

_EXTRA = ("transformers", "trl", "datasets", "accelerate")


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer.

    Args:
        model: a transformers model, float32.
        tokenizer: its tokenizer, which has an end-of-sequence and a padding token; None if none was asked for and
            there is none.
        stops: tokens that end a completion beside the model's own.
    """

    model: Any
    tokenizer: Any
    stops: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def eos_ids(self) -> list[int]:
        """Every token that ends a completion."""
        declared = self.model.generation_config.eos_token_id
        ids = declared if isinstance(declared, list) else [] if declared is None else [declared]
        return sorted({self.tokenizer.eos_token_id, *ids, *self.stops})

    @contextmanager
    def ending(self) -> Iterator[None]:
        """While it lasts, whoever reads the model's generation config ends at the same tokens."""
        config = self.model.generation_config
        before = config.eos_token_id
        if self.stops:
            config.eos_token_id = self.eos_ids
        try:
            yield
        finally:
            config.eos_token_id = before

    @property
    def context(self) -> int | None:
        """The most tokens that prompt and completion may have together; None if the model does not say."""
        length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if length is None else int(length)

    def prompt_ids(self, prompt: str, room: int) -> list[int]:
        """Tokens of a prompt that leaves room for a completion.

        Raises:
            ModelError: prompt and completion do not fit into the context, or a token has no row in the embedding.
        """
        ids: list[int] = self.tokenizer(prompt).input_ids
        self.require_rows(ids)
        if self.context is not None and len(ids) + room > self.context:
            shown = prompt if len(prompt) <= 60 else prompt[:57] + "…"
            raise ModelError(
                f"prompt '{shown}' has {len(ids)} tokens, and with a completion of {room} exceeds the model's context "
                f"of {self.context}: choose a task with shorter prompts, or shorter completions"
            )
        return ids

    def require_rows(self, ids: Sequence[int]) -> None:
        """Check that the embedding has a row for every token: a tokenizer may know more of them than the model.

        Raises:
            ModelError: it has none for one of them.
        """
        rows = self.model.get_input_embeddings().weight.shape[0]
        if ids and max(ids) >= rows:
            raise ModelError(
                f"token {max(ids)} ({self.tokenizer.convert_ids_to_tokens(max(ids))!r}) has no row in the embedding of "
                f"{rows}: the tokenizer is another model's, or its new tokens were never added to the model"
            )


def require_training_extra(wanted: str) -> None:
    """Check that what runs models is installed.

    Args:
        wanted: what needs it, for the message.

    Raises:
        ModelError: some of it is not.
    """
    absent = [package for package in _EXTRA if importlib.util.find_spec(package) is None]
    if absent:
        raise ModelError(f"{wanted} needs {', '.join(absent)}: {install_command('train')}")


def resolve_device(device: str) -> str:
    """`cpu` or `cuda`, from `auto` or either.

    Raises:
        ModelError: cuda is asked for and there is none, or torch knows no such device.

    >>> resolve_device("cpu")
    'cpu'
    """
    try:
        torch.device("cpu" if device == "auto" else device)
    except RuntimeError:
        raise ModelError(f"there is no device {device!r}: choose 'auto', 'cpu' or 'cuda'") from None
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device 'cuda' is not available to torch on this machine: choose 'auto' or 'cpu'")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def open_language_model(
    source: str | Path, device: str = "auto", trust_remote_code: bool = False, *, tokenizer: bool = True
) -> LanguageModel:
    """A model and its tokenizer, whatever their stored precision, in float32.

    Args:
        source: a folder, a Hugging Face id, or `embedded`.
        device: `auto`, `cpu` or `cuda`.
        trust_remote_code: whether Python code that comes with the checkpoint may be executed if it requires that.
        tokenizer: whether a tokenizer is required; if not, a missing one is None.

    Raises:
        ModelError: there is no such model, it is not a causal language model, its tokenizer is missing or unusable, or
            it needs its own Python code, which is not trusted.
    """
    require_training_extra("opening a language model")
    transformers: Any = importlib.import_module("transformers")
    place = resolve_device(device)
    name = model_name(source)
    with quiet_libraries(), to_be_found(name):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # bad folders, foreign architectures and lost connections all differ
            _refuse_own_code(name, "model", error)
            raise ModelError(f"transformers cannot open {name} as a causal language model: {_reason(error)}") from error
        opened = LanguageModel(model.to(place).eval(), None)
        try:
            return _with_tokenizer(opened, name, trust_remote_code)
        except ModelError:
            if tokenizer:
                raise
            return opened


@contextmanager
def to_be_found(name: str) -> Iterator[None]:
    """While it lasts, a model that is not in a folder is read from the Hub, or from its cache if the Hub is away.

    Args:
        name: as `model_name` has it.

    Raises:
        ModelError: it is in neither.
    """
    if Path(name).is_dir():
        yield
        return
    with asked_once(name, "model", ModelError) as answers:
        if not answers and not is_cached(name):
            raise ModelError(
                f"{name} is not a local folder; as a model of the Hub it is not in the cache, and the Hub cannot be "
                "reached (or HF_HUB_OFFLINE is set): check the name and the network"
            )
        yield


def _with_tokenizer(opened: LanguageModel, name: str, trust_remote_code: bool) -> LanguageModel:
    """The model with the tokenizer beside it, if that can be used."""
    try:
        tokenizer = open_tokenizer(name, padding_side="left", trust_remote_code=trust_remote_code)
    except Exception as error:
        _refuse_own_code(name, "tokenizer", error)
        raise ModelError(
            f"model {name} has no usable tokenizer beside its weights ({_reason(error)}): copy its tokenizer files "
            "there"
        ) from error
    try:
        ids = tokenizer("0").input_ids
    except Exception as error:  # settings of any type, which are found out at the first use
        raise ModelError(f"the tokenizer of {name} is damaged ({_reason(error)}): copy its files again") from error
    if not ids:
        raise ModelError(f"model {name} has no usable tokenizer in its folder: copy its tokenizer files there")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name} has no end-of-sequence token: set one in tokenizer_config.json")
    found = replace(opened, tokenizer=tokenizer)
    found.require_rows([tokenizer.eos_token_id])
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= len(opened.model.get_input_embeddings().weight):
        tokenizer.pad_token = tokenizer.eos_token
    return found


def open_tokenizer(name: str | Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The tokenizer of a folder or id; errors are transformers' own. Python that comes with it runs only if trusted.

    Raises:
        ModelError: its steps would not end or fill the memory.
    """
    transformers: Any = importlib.import_module("transformers")
    if Path(name).is_dir():
        require_tame(Path(name))
    elif found := transformers.utils.cached_file(
        name, TOKENIZER, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    ):
        require_tame(Path(found).parent)
    return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)


def model_name(source: str | Path) -> str:
    """The folder or Hugging Face id that a source stands for; of a GGUF file, the folder that it is dequantised into.

    Raises:
        ModelError: it is not a name, or a folder that does not exist, is an adapter or does not contain a model.
    """
    if not isinstance(source, str | PathLike):
        raise ModelError(
            f"the model is a {type(source).__name__}: give a folder or a Hugging Face id; save an open one first, or "
            "where open models are taken, give what open_language_model opens"
        )
    if str(source) == EMBEDDED:
        return str(embedded_base())
    path = Path(source).expanduser()
    if path.suffix == SUFFIX and path.is_file():
        return str(folder_of(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            if is_adapter(path):
                raise ModelError(f"{path} is an adapter: merge it into its base first, and give the merged model")
            raise ModelError(f"folder {path} does not contain a model: it has no config.json")
        return str(path)
    looks_like_path = isinstance(source, Path) or path.is_absolute() or str(source).startswith((".", "~"))
    if path.exists() or looks_like_path or str(source).count("/") > 1:
        raise ModelError(f"{path} does not exist or is not a folder: give a folder with config.json and weights")
    return str(source)


def identify(source: str | Path, model: Any) -> dict[str, str]:
    """The identity of a base: the source as given, and a hash of its names and weights as float32."""
    return {"source": str(source), "weights_blake2b": hash_of(model.state_dict())}


def hash_of(weights: Mapping[str, torch.Tensor]) -> str:
    """A hash of names, shapes and values as float32, 32 hexadecimal digits; a tied head counts under both its names."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def _refuse_own_code(name: str, part: str, error: Exception) -> None:
    """Raises ModelError if transformers would have had to execute Python that comes with a checkpoint."""
    if "trust_remote_code" in str(error):
        raise ModelError(
            f"the {part} of {name} needs Python code that comes with the checkpoint (auto_map), which is not executed: "
            "read that code, and if you trust it set trust_remote_code (gates: --trust-remote-code; training: --set "
            "trust_remote_code=true)"
        ) from error


def _reason(error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return f"{first[:-1]} …" if first.endswith(":") else first  # what follows is a list of possible causes
