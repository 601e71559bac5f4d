"""The one exception that a user is meant to read: it is shown as a single line without traceback, exit code 2."""


class UserError(Exception):
    """A mistake that the user can correct. The message is one line with the setting, the value found and what to do."""


def nearest(name: str, known) -> str:
    """A hint for an unknown name: `did you mean 'x'?` if a known name is similar, or else the list of known names."""
    import difflib

    known = sorted(str(k) for k in known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
