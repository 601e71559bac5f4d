"""Quiet libraries, and faster imports of them."""

import atexit
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def silence() -> None:
    """Silence what libraries print at every start; to be called before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a warning at each loading process
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # socket traces around every lost rank
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch.profiler on missing GPUs
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    # This is a filter and not a level, because DeepSpeed sets the level when it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


@contextmanager
def importing() -> Iterator[None]:
    """Import libraries inside without the trackers that they would import, which takes seconds.

    Garbage collection is off inside: a sixth of a start would be spent on looking for garbage among
    a million imported objects.
    """
    imported_before = {*sys.modules}
    hidden = {"mlflow", "wandb"} - imported_before
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if sys.modules.keys() > imported_before:
            gc.freeze()
            atexit.register(gc.unfreeze)  # triton would report what is left then as leaked
        if collects:
            gc.enable()
