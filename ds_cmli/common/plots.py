"""matplotlib, which is an optional part: it draws to files alone, without a display."""

from typing import Any


def matplotlib() -> Any:
    """pyplot, drawing to files; raises ImportError where matplotlib is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
