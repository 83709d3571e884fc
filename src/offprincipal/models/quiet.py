"""Keep the libraries' own bars, warnings and logs off the terminal while ours is shown."""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("transformers", "trl", "datasets", "accelerate", "huggingface_hub")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Only errors of these libraries show inside; everything is as before after it."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    transformers_logging = importlib.import_module("transformers.utils.logging")
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    datasets_bars = "datasets" in sys.modules and not sys.modules["datasets"].are_progress_bars_disabled()
    if datasets_bars:
        sys.modules["datasets"].disable_progress_bars()
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
        if datasets_bars:
            sys.modules["datasets"].enable_progress_bars()


def send_no_telemetry() -> None:
    """Have TRL and the Hub's library send nothing of what is trained, unless HF_HUB_DISABLE_TELEMETRY says 0."""
    if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        setattr(importlib.import_module("huggingface_hub.constants"), "HF_HUB_DISABLE_TELEMETRY", True)  # noqa: B010
