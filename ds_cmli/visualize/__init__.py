"""Draws match maps: for each word of a caption its best patches of the picture, for each patch its
best word.
"""

from ds_cmli.visualize.figure import write_figure
from ds_cmli.visualize.page import Panel, write_page

__all__ = ["Panel", "write_figure", "write_page"]
