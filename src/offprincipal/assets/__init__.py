"""What is shipped inside the package: the embedded base model."""

from importlib import resources
from pathlib import Path

from offprincipal.errors import ModelError

EMBEDDED = "embedded"  # how commands and settings name it


def embedded_base() -> Path:
    """The folder of the embedded base model.

    Raises:
        ModelError: this installation does not hold it.
    """
    folder = Path(str(resources.files("offprincipal.assets"))) / "base"
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"the embedded base model is not at {folder}: reinstall offprincipal, or make it with "
            "scripts/pretrain_base.py, or name another model"
        )
    return folder
