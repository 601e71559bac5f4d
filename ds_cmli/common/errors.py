"""The one exception a user is meant to read: a single line, no traceback, exit code 2."""


class UserError(Exception):
    """A mistake the user can mend. The message names the setting, the value found and what to do, on one line."""


def nearest(name: str, known) -> str:
    """`"; did you mean 'x'?"` for the known name closest to `name`, or a list of the known names."""
    import difflib

    known = sorted(str(k) for k in known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
