"""Match maps: what each word of a caption finds in its picture, and each patch of the picture in the caption."""

from ds_cmli.visualize.figure import write_figure
from ds_cmli.visualize.page import Panel, write_page

__all__ = ["Panel", "write_figure", "write_page"]
