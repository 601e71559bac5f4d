"""Access to matplotlib, which is optional, and the look of charts."""

from importlib.util import find_spec
from typing import Any

from ds_cmli.common.cli import check_writable
from ds_cmli.common.errors import UserError

# The colours of every chart: the same on light and on dark paper. Any two stay apart for
# readers with deuteranopia and protanopia too: by 0.07 and more in OKLab, in a simulation of both
# (Machado, Oliveira and Fernandes, 2009).
COLOURS = (
    "#6f4bd8",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#999933",
    "#546e7a",
    "#7b3f00",
    "#bcbd22",
    "#882255",
    "#88ccee",
    "#228833",
    "#f4a6b7",
    "#5e4fa2",
    "#ddcc77",
)
ACCENT = COLOURS[0]
ENDINGS = (".png", ".svg", ".pdf")  # of the formats of pictures
SOFT = "#7a7f88"  # of text and axes, legible on light and on dark paper
STYLE = {
    "font.size": 10,
    "savefig.transparent": True,
    "text.color": SOFT,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": SOFT,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
}


def installed() -> bool:
    return find_spec("matplotlib") is not None


def check_installed(needed_by: str) -> None:
    """Raise `UserError` if matplotlib is missing, before the work whose result will be drawn."""
    if not installed():
        raise UserError(f"{needed_by} needs matplotlib: pip install matplotlib")


def check_picture(option: str, path: str | None) -> None:
    """Raise `UserError` for a picture that could not be drawn or written in the end."""
    if path is None:
        return
    check_installed(option)
    if not path.endswith(ENDINGS):
        raise UserError(f"{option} is {path!r}: end its name in one of {' '.join(ENDINGS)}")
    check_writable(path)


def matplotlib(needed_by: str) -> Any:
    """The module pyplot, set to draw to files; raises `UserError` if it is not installed."""
    check_installed(needed_by)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.style.use(STYLE)
    return pyplot
