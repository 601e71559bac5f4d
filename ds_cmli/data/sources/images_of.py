"""Finding the folder of the images that a list names by relative paths."""

import itertools
import os
from pathlib import Path

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig

LOOKED_AT = (
    100  # of the files that a list names, so many are looked for: the first ones may be missing
)


def image_folder(
    listed: Path, files: list[str], config: DataConfig, subfolders: tuple[str, ...] = ()
) -> Path:
    """The folder that holds one of the files: `data.image_root` if given, else the list's folder or its parent.

    Args:
        files: the first files that the list names.
        subfolders: subfolders of these that are searched too, beside "images".

    Raises:
        UserError: none of the folders holds one of the files.
    """
    roots = (
        [Path(config.image_root).expanduser()]
        if config.image_root
        else [listed.parent, listed.parent.parent]
    )
    places = [root / sub for root in roots for sub in ("", "images", *subfolders)]
    for file, place in itertools.product(files, places):
        if "\0" in file or os.path.exists(place / file):  # the former is refused by its line
            return place
    looked = ", ".join(str(place) for place in places if place.is_dir()) or config.image_root
    raise UserError(
        f"{listed} names the image {files[0]!r}, which is not in {looked}: give its folder by --image-root"
    )
