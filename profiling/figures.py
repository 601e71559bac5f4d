"""What the scripts' charts share: their size, the sentence above them, and the labels of ticks."""

from typing import TYPE_CHECKING

from ds_cmli.common.plots import SOFT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.5  # inches; at this width text is legible where a page shows the picture 400 pixels wide
DPI = 200


def titled(figure: "Figure", finding: str, what: str = "") -> None:
    """Write what a chart shows above it: the finding in bold, below it `what` was drawn."""
    size = min(12.0, 840 / max(1, len(finding)))  # a longer line is set smaller, so that it fits
    figure.suptitle(finding, x=0.01, ha="left", weight="bold", size=size)
    if what:
        figure.axes[0].set_title(what, size=9.5, weight="normal", color=SOFT)


def plain(value: float, _: object = None) -> str:
    """The label of a tick as a number without exponent: 0.1, 10, 1,000."""
    return f"{value:,.12g}"


def percent(value: float, _: object = None) -> str:
    """The label of a tick as percent: 0.1%, 10%, 1,000%."""
    return f"{100 * value:,.6g}%"
