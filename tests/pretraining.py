"""The pretraining script as a module: it is no part of the package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def pretraining_script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "pretrain_base.py"
    spec = importlib.util.spec_from_file_location("pretrain_base", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
