"""Finding the folder of the images that a list names by relative paths."""

from pathlib import Path

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig


def image_folder(listed: Path, first: str, config: DataConfig, subfolders: tuple[str, ...] = ()) -> Path:
    """The folder that holds the first listed file: `data.image_root` if given, else the list's folder or its parent.

    Args:
        subfolders: subfolders of these that are searched too, beside "images".

    Raises:
        UserError: none of the folders holds the file.
    """
    roots = [Path(config.image_root).expanduser()] if config.image_root else [listed.parent, listed.parent.parent]
    places = [root / sub for root in roots for sub in ("", "images", *subfolders)]
    for place in places:
        if (place / first).exists():
            return place
    looked = ", ".join(str(place) for place in places if place.is_dir()) or config.image_root
    raise UserError(f"{listed} names the image {first!r}, which is not in {looked}: give its folder by --image-root")
