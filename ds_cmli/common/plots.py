"""Access to matplotlib, which is an optional dependency. It draws to files only and needs no display."""

from importlib.util import find_spec
from typing import Any

from ds_cmli.common.errors import UserError


def installed() -> bool:
    return find_spec("matplotlib") is not None


def check_installed(needed_by: str) -> None:
    """Raise `UserError` if matplotlib is missing. To be called before the work whose result will be drawn."""
    if not installed():
        raise UserError(f"{needed_by} needs matplotlib: pip install matplotlib")


def matplotlib(needed_by: str) -> Any:
    """The module pyplot, set to draw to files. Raises `UserError` if matplotlib is not installed."""
    check_installed(needed_by)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
