"""A context in which libraries load pretrained models: without code from files, and quietly."""

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

from filelock import FileLock

SECONDS_OF_START = 3600.0  # in which the ranks of a node read what one has fetched


@contextmanager
def loading(hub: bool, name: str = "") -> Iterator[None]:
    """Guard every call that loads a model or a tokenizer.

    Inside, torch.load accepts nothing but tensors, whatever arguments a library gives it.

    Args:
        hub: whether the call may ask the model hub. If the hub does not answer the first request,
            only its local cache is used; the library itself would retry for up to a minute a file.
        name: of what is loaded. If it is given, one rank of a node asks the hub, and the others
            read what it has fetched.
    """
    from huggingface_hub import constants
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"))
        for library in ("huggingface_hub", "timm", "transformers"):
            logger = logging.getLogger(library)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        is_fetched = hub and bool(name) and stack.enter_context(fetched_on_this_node(name))
        offline = constants.HF_HUB_OFFLINE or is_fetched
        offline = offline or (hub and not _answers(constants.ENDPOINT))
        stack.enter_context(mock.patch.object(constants, "HF_HUB_OFFLINE", offline))
        yield


@contextmanager
def fetched_on_this_node(name: str) -> Iterator[bool]:
    """Yield True if another rank of this start and node has fetched `name`; else this one does.

    The others wait for it. If it fails, the next rank tries. Ranks of a node have the launcher as
    their parent process, and a folder for temporary files; a marker in it says what is fetched.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield False
        return
    folder = Path(tempfile.gettempdir()) / f"ds-cmli-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    start = os.environ.get("MASTER_PORT", "")
    digest = hashlib.sha256(f"{os.getppid()} {start} {name}".encode()).hexdigest()
    marker = folder / f"{digest[:24]}.fetched"
    with FileLock(marker.with_suffix(".lock")) as lock:
        if marker.exists() and time.time() - marker.stat().st_mtime < SECONDS_OF_START:
            lock.release()
            yield True
            return
        yield False
        marker.touch()


@cache
def _answers(url: str) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(url, timeout=10)
    except Exception:  # the type depends on the HTTP client that the library uses
        return False
    return True
