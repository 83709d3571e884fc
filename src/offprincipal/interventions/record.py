"""The record of an intervention, `intervention.json`: operations, hashes of weights, and measured differences.

When a record is read, every field that is used is checked.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offprincipal.checkpoints.hostile import read_json
from offprincipal.errors import CheckpointError, InterventionError
from offprincipal.file_names import INTERVENTION
from offprincipal.interventions.orthogonal import MATRICES
from offprincipal.interventions.plan import Request

SCHEMA = 1
DTYPES = ("float32", "bfloat16", "float16")
MOST_SEED = 2**32


@dataclass(frozen=True)
class InterventionRecord:
    """The record of an intervention.

    Args:
        base: `source`, the model's name or path, and `weights_blake2b`, a hash of its names and weights as float32.
        architecture: the model type.
        request: the requested operations, layers, matrix and seed.
        dtype: dtype of the stored weights.
        result: `weights_blake2b` of the stored weights; a run that was trained from them records the same hash.
        proof: `logits_relative_difference`, in float64, over `sequences` sequences of `length` uniformly random tokens;
            `kl_stored`, the KL divergence from the base due to storing the result, in nats per token, over as many
            tokens sampled from the base; `kl_computed`, the same for the base computed in `dtype`.
        versions: of Python and of the packages on which the figures depend.

    >>> InterventionRecord({}, "llama", Request(rotate=(0,)), "bfloat16", {}, {}, {}).as_json()["request"]["rotate"]
    (0,)
    """

    base: Mapping[str, str]
    architecture: str
    request: Request
    dtype: str
    result: Mapping[str, str]
    proof: Mapping[str, float | int]
    versions: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """The content of `intervention.json`."""
        return {"schema": SCHEMA, **asdict(self)}


def read_record(source: str | Path) -> InterventionRecord:
    """Read the record of an intervention.

    Args:
        source: `intervention.json`, or the folder that `intervene` wrote.

    Returns:
        The record.

    Raises:
        InterventionError: there is no record, or it is invalid; the message names the field.

    >>> import json, tempfile
    >>> written = InterventionRecord(
    ...     base={"source": "embedded", "weights_blake2b": "0"},
    ...     architecture="qwen3",
    ...     request=Request(rotate=(0,)),
    ...     dtype="bfloat16",
    ...     result={"weights_blake2b": "1"},
    ...     proof={"logits_relative_difference": 0.0},
    ...     versions={},
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / INTERVENTION).write_text(json.dumps(written.as_json()))
    ...     read_record(folder) == written
    True
    """
    path = Path(source).expanduser()
    path = path / INTERVENTION if path.is_dir() else path
    if not path.exists():
        raise InterventionError(
            f"no record of an intervention: {path} is not there. Give the {INTERVENTION} that `intervene` wrote, "
            "or the folder that it is in"
        )
    try:
        content = read_json(path)
    except CheckpointError as error:
        raise InterventionError(
            f"{path} is not a record of an intervention, nor any JSON: give the {INTERVENTION} that `intervene` wrote"
        ) from error
    if content.get("schema") != SCHEMA:
        raise InterventionError(
            f"{path} is not a record of schema {SCHEMA}: give the {INTERVENTION} that `offprincipal intervene` wrote"
        )
    return InterventionRecord(
        base=_words(content, "base", ("source", "weights_blake2b"), path),
        architecture=_one_of(content, "architecture", str, path),
        request=_request(content, path),
        dtype=_one_of(content, "dtype", str, path, DTYPES),
        result=_words(content, "result", ("weights_blake2b",), path),
        proof=_numbers(content, "proof", path),
        versions={str(package): str(version) for package, version in _one_of(content, "versions", dict, path).items()},
    )


def require_request(request: Request, layers: int | None = None) -> None:
    """Check a request.

    Args:
        request: the operations.
        layers: number of layers of the model; None: unknown, so layers are not checked against it.

    Raises:
        InterventionError: nothing is requested, or a layer, the matrix or the seed is out of range.
    """
    if not (request.rotate or request.permute or request.residual):
        raise InterventionError(
            "nothing to do: give layers to rotate or permute (--rotate 0-3, --permute all), or --residual"
        )
    if request.matrix not in MATRICES:
        raise InterventionError(f"no matrix {request.matrix!r}: choose {' or '.join(MATRICES)}")
    if type(request.seed) is not int or not 0 <= request.seed < MOST_SEED:
        raise InterventionError(f"seed {request.seed!r} is not a whole number from 0 to 2**32 − 1")
    for word, named in (("rotate", request.rotate), ("permute", request.permute)):
        for layer in named:
            if type(layer) is not int or layer < 0 or (layers is not None and layer >= layers):
                there = "" if layers is None else f": the model has layers 0 to {layers - 1}"
                raise InterventionError(f"cannot {word} layer {layer!r}{there or ': layers are counted from 0'}")


def _request(content: dict[str, Any], path: Path) -> Request:
    fields = _one_of(content, "request", dict, path)
    try:
        request = Request(
            rotate=tuple(_one_of(fields, "rotate", list, path)),
            permute=tuple(_one_of(fields, "permute", list, path)),
            residual=_one_of(fields, "residual", bool, path),
            matrix=_one_of(fields, "matrix", str, path),
            seed=_one_of(fields, "seed", int, path),
        )
        require_request(request)
    except InterventionError as error:
        raise InterventionError(f"{path} is not a usable record: {error}") from error
    return request


def _one_of(content: dict[str, Any], key: str, kind: type, path: Path, allowed: tuple[str, ...] | None = None) -> Any:
    """The value of a key, checked to be of a type and, if given, among the allowed values."""
    value = content.get(key)
    if type(value) is not kind or (allowed is not None and value not in allowed):
        raise InterventionError(f"{path} is not a usable record: {key} is {value!r}. Give what `intervene` wrote")
    return value


def _words(content: dict[str, Any], key: str, keys: tuple[str, ...], path: Path) -> dict[str, str]:
    fields = _one_of(content, key, dict, path)
    return {word: _one_of(fields, word, str, path) for word in keys}


def _numbers(content: dict[str, Any], key: str, path: Path) -> dict[str, float | int]:
    numbers: dict[str, float | int] = _one_of(content, key, dict, path)
    for word, value in numbers.items():
        if type(value) not in (int, float) or not abs(value) < float("inf"):
            raise InterventionError(f"{path} is not a usable record: {word} is {value!r}. Give what `intervene` wrote")
    return numbers
