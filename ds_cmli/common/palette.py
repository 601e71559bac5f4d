"""The colours of every chart and page: the same on light and on dark paper.

Any two of them stay apart for readers with deuteranopia and protanopia too: by 0.07 and more in
OKLab, in a simulation of both (Machado, Oliveira and Fernandes, 2009).
"""

COLOURS = (
    "#6f4bd8", "#009e73", "#cc79a7", "#56b4e9", "#999933", "#546e7a", "#7b3f00", "#bcbd22", "#882255", "#88ccee",
    "#228833", "#f4a6b7", "#5e4fa2", "#ddcc77",
)  # fmt: skip
LINES = COLOURS[:6]  # those that are seen as thin lines on both papers
ACCENT = COLOURS[0]


def line(number: int) -> tuple[str, str]:
    """The colour and the dashes, as matplotlib names them, of a chart's line."""
    return LINES[number % len(LINES)], ("-", "--", ":", "-.")[number // len(LINES) % 4]
