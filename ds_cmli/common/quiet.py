"""Silences messages that libraries print at every start and that a user can do nothing about, and
puts off collections of garbage until they are imported."""

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

USUAL = gc.get_threshold()


@contextmanager
def without_trackers() -> Iterator[None]:
    """Hide from libraries, inside, trackers that they would import, which takes seconds."""
    hidden = {"mlflow", "wandb"} - sys.modules.keys()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def silence() -> None:
    """Set the libraries' switches. To be called before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a warning at each loading process
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # socket traces around every lost rank
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch.profiler on missing GPUs
    # A sixth of a start would be spent on looking for garbage among a million imported objects.
    if "deepspeed" not in sys.modules:
        gc.set_threshold(100_000)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    # This is a filter and not a level, because DeepSpeed sets the level when it is imported.
    logging.getLogger("DeepSpeed").addFilter(only_errors)


def imported() -> None:
    """Look for garbage as usual again, after `silence`, but not among what was imported."""
    if gc.get_threshold() != USUAL:
        gc.freeze()
        gc.set_threshold(*USUAL)


def only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
