"""matplotlib, which is an optional part: it draws to files alone, without a display."""

from importlib.util import find_spec
from typing import Any

from ds_cmli.common.errors import UserError


def installed() -> bool:
    return find_spec("matplotlib") is not None


def check_installed(needed_by: str) -> None:
    """Raises `UserError` where matplotlib is missing; to be called before the work whose result is drawn."""
    if not installed():
        raise UserError(f"{needed_by} needs matplotlib: pip install matplotlib")


def matplotlib(needed_by: str) -> Any:
    """pyplot, drawing to files. Raises `UserError` where matplotlib is not installed."""
    check_installed(needed_by)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
