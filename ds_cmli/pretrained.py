"""How libraries load pretrained models here: without code from files, and quietly."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from unittest import mock


@contextmanager
def loading(hub: bool) -> Iterator[None]:
    """A context for every call that loads a model or a tokenizer.

    torch.load accepts nothing but tensors in it, whatever arguments a library gives it.

    Args:
        hub: whether the call may ask the model hub. If the hub does not answer the first request,
            only its local cache is used; the library itself would retry for up to a minute a file.
    """
    from huggingface_hub import constants
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"))
        for name in ("huggingface_hub", "timm", "transformers"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        offline = constants.HF_HUB_OFFLINE or (hub and not _answers(constants.ENDPOINT))
        stack.enter_context(mock.patch.object(constants, "HF_HUB_OFFLINE", offline))
        yield


@cache
def _answers(url: str) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(url, timeout=10)
    except Exception:  # the type depends on the HTTP client that the library uses
        return False
    return True
