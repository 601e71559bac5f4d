"""Where the image files of a list lie that names them by relative paths."""

from pathlib import Path

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig


def image_folder(listed: Path, first: str, config: DataConfig, subfolders: tuple[str, ...] = ()) -> Path:
    """The folder in which the first listed file lies: `data.image_root`, the list's folder, or the one above it.

    Args:
        subfolders: of these, to be looked into too.

    Raises:
        UserError: it lies in none of them.
    """
    roots = [Path(config.image_root).expanduser()] if config.image_root else [listed.parent, listed.parent.parent]
    places = [root / sub for root in roots for sub in ("", "images", *subfolders)]
    for place in places:
        if (place / first).exists():
            return place
    looked = ", ".join(str(place) for place in places if place.is_dir()) or config.image_root
    raise UserError(f"{listed} names the image {first!r}, which is not in {looked}: give its folder by --image-root")
