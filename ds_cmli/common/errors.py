"""The one exception that a user is meant to read: one line without traceback, exit code 2."""

from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can correct.

    The message is one line with the setting, the value found and what to do.
    """


def one_line(error: Exception) -> str:
    """An error's message, or its type's name where it has none, as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, known: Iterable[object]) -> str:
    """Hint at what an unknown name may mean: `did you mean 'x'?`, or else all known names."""
    import difflib

    names = sorted(map(str, known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}"
