"""How libraries load pretrained models here: without code from files, quietly and quickly."""

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

from ds_cmli.common.patches import environment, patched

LIBRARIES = ("huggingface_hub", "timm", "transformers")


@contextmanager
def loading(hub: bool) -> Iterator[None]:
    """A context for every call that loads a model or a tokenizer.

    Args:
        hub: whether the call may ask the model hub. If the hub does not answer the first request,
            only its local cache is used; the library itself would retry for up to a minute.
    """
    from huggingface_hub import constants
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with ExitStack() as stack:
        # torch.load then accepts nothing but tensors, whatever arguments a library gives it.
        stack.enter_context(environment({"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}))
        for name in LIBRARIES:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if hub and not constants.HF_HUB_OFFLINE:
            offline = not _answers(constants.ENDPOINT)
            stack.enter_context(patched("huggingface_hub: offline", lambda _: offline))
        yield


@cache
def _answers(url: str) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(url, timeout=10)
    except Exception:  # the type depends on the HTTP client that the library uses
        return False
    return True


def refused_code(error: Exception) -> str | None:
    """The message for a pickle that torch refuses, without its advice; None for other errors."""
    text = str(error)
    if "weights_only" not in text and type(error).__name__ != "UnpicklingError":
        return None
    named = re.search(r"(?:GLOBAL|globals:) ([\w.]+\w)", text)
    accepted = f"tensors ({named[1]})" if named else "tensors"
    return f"it holds more than {accepted}, and code in pickles is never run"


def reason(error: Exception) -> str:
    """Why a library could not load something, in one line that advises nothing unsafe."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    refused = refused_code(error)
    if refused is not None:
        return f"{refused}: give a .safetensors file, or a state dict that torch.save wrote"
    if "SentencePiece library" in text or "protobuf library" in text:
        return "its spiece.model needs `pip install sentencepiece protobuf`"
    if "trust_remote_code" in text:
        return (
            "it needs code of its own, which is never run: choose a model that the transformers "
            "library has"
        )
    if (
        type(error).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled")
        or "couldn't connect" in text
    ):
        return (
            "the model hub cannot be reached and its cache does not have it: give a local path, or "
            "another model"
        )
    alone = isinstance(error, KeyError | IndexError) or not text
    return (f"{type(error).__name__}: {text}" if alone else text)[:300]
