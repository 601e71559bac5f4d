"""Draws a match map as a picture for a paper: each word has a colour, and a map of its similarity to the patches.

Shapes: S image side in pixels, N image patches, M words.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ds_cmli.common.errors import UserError
from ds_cmli.common.plots import matplotlib

COLUMNS = 6  # pictures per row
DARK = 0.35  # brightness of the picture behind a map


def write_figure(panel: Any, path: str | Path) -> None:
    """Draw a `Panel`, with a block of pictures for each model.

    A block begins with the picture in which each patch has its best word's colour; a map of each word follows.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    pyplot = matplotlib("a picture of match maps")
    image = panel.image.permute(1, 2, 0).numpy()  # [S, S, 3]
    words = next(iter(panel.matches.values())).words
    colours = [pyplot.get_cmap("tab20")(i % 20)[:3] for i in range(len(words))]
    rows = -(-(len(words) + 1) // COLUMNS)
    figure, axes = pyplot.subplots(
        rows * len(panel.matches), COLUMNS, figsize=(2 * COLUMNS, 2.3 * rows * len(panel.matches)),
        constrained_layout=True, squeeze=False,
    )  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")
    side = image.shape[0]
    for m, (name, match) in enumerate(panel.matches.items()):
        places = axes[m * rows : (m + 1) * rows].flat
        similarity = match.similarity.numpy()  # [M, N]
        first = next(places)
        best = np.array(colours)[match.word_of_patch.numpy()].reshape(*match.grid, 3)
        first.imshow(image)
        first.imshow(best, extent=(0, side, side, 0), alpha=0.5, interpolation="nearest")
        first.set_title(name, fontsize=9)
        for w, word in enumerate(words):
            axis = next(places)
            axis.imshow(image * DARK / 255)
            axis.imshow(
                similarity[w].reshape(match.grid), extent=(0, side, side, 0), alpha=0.7, cmap="inferno",
                interpolation="nearest",
            )  # fmt: skip
            row, column = divmod(int(match.patch_of_word[w]), match.grid[1])
            height, width = side / match.grid[0], side / match.grid[1]
            place = (column * width, row * height)
            axis.add_patch(pyplot.Rectangle(place, width, height, fill=False, edgecolor="cyan", linewidth=1.5))
            axis.set_title(word, fontsize=9, color=colours[w])
    figure.suptitle(panel.text, fontsize=11)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture is {str(path)!r}: cannot write it: {error}") from None
    finally:
        pyplot.close(figure)
