"""The one exception that a user is meant to read: one line without traceback, exit code 2."""

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can correct.

    The message is one line with the setting, the value found and what to do.
    """


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Turn a library's exception into a `UserError` of one line that begins with `what`.

    With DS_CMLI_TRACEBACK=1 the exception stays as it is.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of Rust, as tokenizers has, is no `Exception`
        if os.environ.get("DS_CMLI_TRACEBACK") == "1":
            raise
        raise UserError(f"{what}: {type(error).__name__}: {one_line(error)[:500]}") from None


def one_line(error: BaseException) -> str:
    """An error's message, or its type's name where it has none, as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "UnpicklingError" or "weights_only" in text:
        # PyTorch advises to run the code.
        text = "it holds more than tensors, and code in pickles is never run: give .safetensors"
    return text


def printable(text: str) -> str:
    r"""The text with what is no Unicode, as in names of files and in JSON, written as \udcff."""
    return text.encode(errors="backslashreplace").decode()


def nearest(name: str, known: Iterable[object]) -> str:
    """Hint at what an unknown name may mean: `did you mean 'x'?`, or else all known names."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"
