"""A user's mistakes: raised as one line, and library exceptions turned into such lines."""

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import click

LOST_CONNECTION = re.compile(
    r"/gloo/transport/.*(by peer|roken pipe|ocket closed|readv|writev)|remote process exited"
)


class UserError(click.ClickException):
    """A mistake that the user can correct: the setting, the value found and what to do."""

    def __init__(self, message: str):
        # PyTorch repeats the error of a loading process with the traceback and the type in front.
        type_prefix = f"{type(self).__module__}.{type(self).__name__}: "
        super().__init__(_after_traceback(message).split(type_prefix, 1)[-1])


@contextmanager
def blame(subject: str) -> Iterator[None]:
    """Turn a library's exception into a `UserError` of one line, unless DS_CMLI_TRACEBACK=1.

    A GPU's out-of-memory error and a lost connection to another rank pass unchanged, because they
    are no mistakes in what was given.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of Rust, as tokenizers has, is no `Exception`
        out_of_memory = type(error).__name__ == "OutOfMemoryError"  # torch is not imported here
        if out_of_memory or lost_connection(error) or os.environ.get("DS_CMLI_TRACEBACK") == "1":
            raise
        raise UserError(f"{subject}: {type(error).__name__}: {one_line(error)[:500]}") from None


def one_line(error: BaseException) -> str:
    """Return an error's message as one line, or the name of its type if it has no message."""
    text = " ".join(_after_traceback(str(error)).split()) or type(error).__name__
    if type(error).__name__ == "UnpicklingError" or "weights_only" in text:
        # PyTorch's message advises to run the code.
        text = "it holds more than tensors, and code in pickles is never run: give .safetensors"
    return text


def _after_traceback(message: str) -> str:
    """Return what follows the traceback in a message, or the message if there is no traceback."""
    if "Traceback (most recent call last):\n" not in message:
        return message
    lines = message.strip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    return "\n".join(lines[max(frames, default=-1) + 1 :])


def lost_connection(error: BaseException) -> bool:
    """Return True for an error of gloo or NCCL that says that another rank has ended."""
    return isinstance(error, RuntimeError) and LOST_CONNECTION.search(str(error)) is not None


MAX_NAMES = 30  # that one line names


def nearest(name: str, names: Iterable[object]) -> str:
    """Return a hint for an unknown name: `did you mean 'x'?`, or the known names, or some."""
    names = sorted(map(str, names))
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f"did you mean '{close[0]}'?"
    if len(names) > MAX_NAMES:
        nearest_names = difflib.get_close_matches(name, names, n=5, cutoff=0)
        return f"known, of {len(names)}, for instance: {', '.join(nearest_names)}"
    return f"known: {', '.join(names)}"
